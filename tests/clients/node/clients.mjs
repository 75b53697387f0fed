// One client of npm's against OPENAI_BASE_URL: `node clients.mjs WHAT` prints what it was answered.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const baseURL = process.env.OPENAI_BASE_URL;
const apiKey = process.env.OPENAI_API_KEY;
const prompt = "What is AI?";
const client = new OpenAI({ maxRetries: 0 });
const chat = { model: "demo_model", messages: [{ role: "user", content: prompt }], max_tokens: 24, temperature: 0 };
const sdk = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "autotp", baseURL, apiKey });
const ask = { prompt, maxOutputTokens: 24, temperature: 0, maxRetries: 0 };
const verdict = z.object({ verdict: z.enum(["yes", "no"]) });

async function join(parts, read) {
  let text = "";
  for await (const part of parts) text += read(part) ?? "";
  return text;
}

const ways = {
  "openai chat": async () => (await client.chat.completions.create(chat)).choices[0].message.content,
  "openai stream": async () => join(await client.chat.completions.create({ ...chat, stream: true }), (part) => part.choices[0]?.delta?.content),
  "openai responses": async () => (await client.responses.create({ model: "demo_model", input: prompt, max_output_tokens: 24, temperature: 0 })).output_text,
  "ai default": async () => (await generateText({ model: sdk("demo_model"), ...ask })).text,
  "ai stream": async () => join(streamText({ model: sdk("demo_model"), ...ask }).textStream, (part) => part),
  "ai chat": async () => (await generateText({ model: sdk.chat("demo_model"), ...ask })).text,
  "ai compatible": async () => (await generateText({ model: compatible("demo_model"), ...ask })).text,
  "ai object": async () => JSON.stringify((await generateObject({ model: sdk("demo_model"), ...ask, maxOutputTokens: 60, schema: verdict })).object),
  "ai tool": async () => {
    const tools = { pick: tool({ description: "Pick one.", inputSchema: verdict }) };
    const { toolCalls } = await generateText({ model: compatible("demo_model"), ...ask, maxOutputTokens: 60, tools, toolChoice: "required" });
    return JSON.stringify(toolCalls[0].input);
  },
};
console.log(await ways[process.argv[2]]());
