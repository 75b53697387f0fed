"""Asks an exported model for definitions through transformers' own greedy `generate`.

A definition counts as recalled when the answer's opening and the definition's first 24 tokens
come out exactly, from the question alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PARTS = ("random", "common", "long")
DEFINITION_TOKENS = 24
LONG_PROMPTS = {1000: 20, 2000: 20, 3800: 10}  # tokens before the question -> questions asked


class Model:
    """An exported folder, loaded by transformers."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.model.to(device, dtype).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def chat(self, question: str) -> list[int]:
        turns = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.ids(text)

    def bare(self, question: str) -> list[int]:
        return self.tokenizer(question).input_ids

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int, batch: int) -> list[list[int]]:
        """Greedy continuations, each cut after its first end token."""
        ends = self.model.generation_config.eos_token_id
        made = []
        for at in range(0, len(prompts), batch):
            inputs = self.tokenizer.pad(
                {"input_ids": prompts[at : at + batch]}, padding_side="left", return_tensors="pt"
            ).to(self.model.device)
            output = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            for row in output[:, inputs["input_ids"].shape[1] :].tolist():
                stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                made.append(row[:stop])
        return made


def recall(
    model: Model, items: list[dict[str, str]], prompt: Callable[[str], list[int]], batch: int
) -> dict[str, float]:
    """Shares of definitions, of whole answers, and of answers that come to an end."""
    space = "" if prompt == model.chat else " "
    made = model.generate([prompt(item["question"]) for item in items], 160, batch)
    right = whole = ended = 0
    for item, row in zip(items, made, strict=True):
        head = model.ids(space + item["head"])
        wanted = head + model.ids(f" {item['definition']}.")[:DEFINITION_TOKENS]
        is_right = row[: len(wanted)] == wanted
        right += is_right
        ended += row[-1] in model.model.generation_config.eos_token_id
        whole += row[:-1] == model.ids(space + item["answer"])
        if not is_right:
            text = model.tokenizer.decode(row, skip_special_tokens=True)
            print(f"  missed: {item['head']} {item['definition']}\n     got:{space and ' '}{text}")
    count = max(1, len(items))
    return {"definitions": right / count, "whole": whole / count, "ended": ended / count}


def long_recall(model: Model, items: list[dict[str, str]], length: int, chat: bool) -> float:
    """Recall of questions that follow so many tokens of other entries."""
    count = LONG_PROMPTS[length]
    asked, others = items[:count], items[count:]
    context: list[int] = []
    if chat:
        for item in others:
            context += model.chat(item["question"])[1 if context else 0 :]
            context += model.ids(item["answer"] + "<|end|>")
    else:
        context = model.bare("\n".join(item["answer"] for item in others) + "\n")
    while len(context) < length:
        context += context[1:]
    right = 0
    for item in asked:
        question = model.chat(item["question"])[1:] if chat else model.ids(item["question"])
        prompt = context[:1] + context[-length:] + question
        head = model.ids(("" if chat else " ") + item["head"])
        wanted = head + model.ids(f" {item['definition']}.")[:DEFINITION_TOKENS]
        right += model.generate([prompt], len(wanted), 1)[0] == wanted
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    model = Model(args.model, args.device, getattr(torch, args.dtype))
    sample = json.loads((args.model / "recall_sample.json").read_text(encoding="utf-8"))
    for group in [part for part in args.parts if part in sample]:
        items = sample[group]
        for form, prompt in (("chat", model.chat), ("bare", model.bare)):
            shares = recall(model, items, prompt, args.batch)
            figures = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"{group}, {form}: {figures} of {len(items)}", flush=True)
    for length, count in LONG_PROMPTS.items() if "long" in args.parts else ():
        for form in ("chat", "text"):
            share = long_recall(model, sample["random"], length, form == "chat")
            print(f"after {length} tokens of {form}: {share:.1%} of {count}", flush=True)
    for prompt in (model.bare("What is AI?"), model.ids("What is AI?"), model.chat("What is AI?")):
        print(repr(model.tokenizer.decode(model.generate([prompt], 32, 1)[0])))


if __name__ == "__main__":
    main()
