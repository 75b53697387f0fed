"""The OpenAI routes in process: no silent field, exact events, refusals, tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.schemas import CompletionRequest
from autotp_serving.request import SamplingParams
from tests.api.service import MAX_MODEL_LEN, client

COMPLETION = {"prompt": "What is AI?", "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "What is AI?"}], "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f"}}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def post_all(requests: list[tuple[str, Any]], **options: Any) -> list[httpx.Response]:
    """Several requests to one fresh service, one after another."""

    async def go() -> list[httpx.Response]:
        async with client(**options) as (http, _):
            return [await http.post(path, json=body) for path, body in requests]

    return asyncio.run(go())


def post(path: str, body: Any, **options: Any) -> httpx.Response:
    return post_all([(path, body)], **options)[0]


def refused_fields(model: Any) -> dict[str, list[Any]]:
    """Fields that are known but not honoured, and the values that ask for nothing."""
    properties = model.model_json_schema()["properties"]
    return {
        name: schema["enum"]
        for name, schema in properties.items()
        if None in schema.get("enum", ())
    }


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openai_is_known(model: Any, params: Any) -> None:
    theirs = set(get_type_hints(params)) | {"stream"}
    assert theirs <= set(model.model_fields), theirs - set(model.model_fields)


@pytest.mark.parametrize(
    ("path", "model"),
    [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)],
)
def test_no_field_is_silently_ignored(path: str, model: Any) -> None:
    """What is not honoured is answered 400 by name, unless it asks for nothing."""
    base = ROUTES[path]
    fields = refused_fields(model)
    assert "use_beam_search" in fields and "presence_penalty" not in fields
    refused = [(name, value) for name in fields for value in ("x", 0.5, True, ["x"], {"x": 1})]
    refused = [(name, value) for name, value in refused if value not in fields[name]]
    replies = post_all([(path, base | {name: value}) for name, value in refused])
    for (name, _), reply in zip(refused, replies, strict=True):
        assert reply.status_code == 400, name
        assert reply.json()["error"]["param"] == name
        assert "not supported yet" in reply.json()["error"]["message"]
    neutral = {name: values[-1] for name, values in fields.items()} | {"not_a_field": None}
    nulls = {name: None for name in model.model_fields if name not in base}
    for reply in post_all([(path, base | neutral), (path, base | nulls)]):
        assert reply.status_code == 200, reply.text


def ignored_fields(model: Any) -> set[str]:
    """Fields that ask nothing of the completion, and are told in a header."""
    properties = model.model_json_schema()["properties"]
    return {name for name, schema in properties.items() if "x-ignored" in schema}


@pytest.mark.parametrize(
    ("path", "model"),
    [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)],
)
def test_what_is_ignored_is_told(path: str, model: Any) -> None:
    base = ROUTES[path] | {"max_tokens": 8}
    names = ignored_fields(model)
    assert {"user", "request_id"} <= names
    values = [{name: value} for name in names for value in ("x", 0.5, True, ["x"], {"x": None})]
    asked = [{}, *values, dict.fromkeys(names, "x"), {"stream": True, "user": "me"}]
    plain, *others, all_at_once, stream = post_all([(path, base | change) for change in asked])
    assert "x-ignored-fields" not in plain.headers
    for change, reply in zip(values, others, strict=True):
        assert reply.headers["x-ignored-fields"] == next(iter(change))
        assert reply.json()["choices"] == plain.json()["choices"]
    assert set(all_at_once.headers["x-ignored-fields"].split(", ")) == names
    assert stream.headers["x-ignored-fields"] == "user"
    deep = {"user": json.loads("[" * 70 + "]" * 70)}
    assert post(path, base | deep).json()["error"]["param"] == "user"


# Fields that speak to a chat template or of reasoning, which these tests' tokenizer does not have.
SHOWN_ELSEWHERE = {
    "model", "chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls",
    "reasoning_effort", "thinking_budget", "max_thinking_tokens", "thinking_token_budget",
    "priority",
}  # fmt: skip

# A value for each field that must show in the reply or in what reaches the sampler.
TELLING: dict[str, Any] = {
    "prompt": "emoji",
    "messages": [{"role": "user", "content": "now"}],
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "seed": 7,
    "stop": ["r"],
    "stop_token_ids": [ord("n")],
    "ignore_eos": True,
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "min_p": 0.1,
    "min_tokens": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 1.0},
    "skip_special_tokens": False,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["x", "y"]},
    "guided_json": {"type": "integer"},
    "guided_regex": "[0-9]{2}",
    "guided_choice": ["x", "y"],
    "guided_grammar": 'start: "x" | "y"',
    "json_schema": {"type": "integer"},
    "regex": "[0-9]{2}",
    "ebnf": 'root ::= "x" | "y"',
    "grammar": 'root ::= "x" | "y"',
    "return_token_ids": True,
    "prompt_logprobs": 1,
    "echo": True,
    "best_of": 2,
    "logprobs": 1,
    "top_logprobs": 2,
    "add_generation_prompt": False,
    "continue_final_message": True,
}
NEEDED = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "max_completion_tokens": {"max_tokens": None},
}
LOGPROBS_OF_CHAT = ("logprobs", "/v1/chat/completions")


@pytest.mark.parametrize(
    ("path", "model"),
    [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)],
)
def test_every_honoured_field_makes_a_difference(path: str, model: Any) -> None:
    """Generated from the schema: a new field must be refused, a label, or seen to do something."""
    honoured = set(model.model_fields) - set(refused_fields(model)) - ignored_fields(model)
    honoured -= SHOWN_ELSEWHERE
    assert honoured <= set(TELLING), honoured - set(TELLING)

    async def answer(change: dict[str, Any]) -> tuple[list[SamplingParams], Any]:
        async with client() as (http, service):
            reply = await http.post(path, json=ROUTES[path] | {"max_tokens": 8} | change)
            assert reply.status_code == 200, reply.text
            params = [sample.params for sample in service.runner.samples]
            if reply.headers["content-type"].startswith("text/event-stream"):
                return params, reply.text.count("data: ")
            whole = reply.json()
            return params, {key: whole[key] for key in whole if key not in ("id", "created")}

    for name in sorted(honoured):
        base = NEEDED.get(name, {})
        change = base | {name: True if (name, path) == LOGPROBS_OF_CHAT else TELLING[name]}
        assert asyncio.run(answer(change)) != asyncio.run(answer(base)), name


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"unknown": 1}, "unknown", "not a field"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"n": 0}, "n", "1"),
        ({"n": 1000}, "n", "128"),
        ({"max_tokens": 1.0}, "max_tokens", "integer"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens", str(MAX_MODEL_LEN)),
        ({"stop_token_ids": [257]}, "stop_token_ids", "0 to 256"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids.0", "integer"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"min_p": 1.1}, "min_p", "less than"),
        ({"min_tokens": -1}, "min_tokens", "greater"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "over the 8"),
        ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens", "structured output"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "less than"),
        ({"presence_penalty": -2.1}, "presence_penalty", "greater"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not the number"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "twice"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "0 to 256"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes"),
        ({"response_format": {"type": "regex"}}, "response_format.value", "text"),
        ({"response_format": {"type": "json", "value": "a"}}, "response_format.value", "regex"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "text"),
        (
            {"response_format": {"type": "json", "schema": {}, "value": {}}},
            "response_format.value",
            "combined",
        ),
        ({"guided_json": {"type": "strang"}}, "guided_json", "strang"),
        ({"guided_json": "{"}, "guided_json", "EOF while parsing"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_grammar": "start: missing"}, "guided_grammar", "missing"),
        ({"guided_regex": "a" * 2**17 + "b"}, "guided_regex", "longer than"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "regex"),
        ({"structured_outputs": {"x": 1}}, "structured_outputs.x", "not a field"),
        (
            {"guided_regex": "a", "structured_outputs": {"choice": ["a"]}},
            "structured_outputs.choice",
            "guided_regex",
        ),
    ],
)
def test_refusals_name_the_field(path: str, change: dict[str, Any], param: str, words: str) -> None:
    reply = post(path, ROUTES[path] | change)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "must be text"),
        ("", "empty"),
        ([], "must be text"),
        ([""], "empty"),
        ([[]], "must be text"),
        (["a", 1], "must be text"),
        ([1, "a"], "must be text"),
        ([[1], "a"], "must be text"),
        ([1.5], "must be text"),
        ([True], "must be text"),
        (5, "must be text"),
        ({"a": 1}, "must be text"),
        ([257], "not from 0 to 256"),
        ([-1], "not from 0 to 256"),
        ([[1], [10**30]], "not from 0 to 256"),
        (["a" * (MAX_MODEL_LEN + 1)], "over the limit"),
        (["\ud800"], "surrogate"),
    ],
)
def test_refused_prompts(prompt: Any, words: str) -> None:
    body = json.dumps({"prompt": prompt}).encode("ascii")

    async def go() -> httpx.Response:
        async with client() as (http, _):
            return await http.post("/v1/completions", content=body)

    reply = asyncio.run(go())
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "prompt"
    assert words in error["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "king", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": "x", "images": ["x"]}], "messages.0.images"),
        ([{"role": "assistant", "content": "x", "prefix": True}], "messages.0.prefix"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "messages.0.tool_calls.0.function",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content"),
    ],
)
def test_refused_messages(messages: Any, param: str) -> None:
    reply = post("/v1/chat/completions", {"messages": messages})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("kind", ["image_url", "input_image", "video_url", "input_audio", "file"])
def test_a_part_that_is_no_text_is_refused_in_one_sentence(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,"}}]
    error = post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}).json()
    assert error["error"]["param"] == "messages.0.content"
    assert error["error"]["message"] == (
        f"messages.0.content: holds a part of type '{kind}': the model reads text only"
    )


def test_length_of_both_names() -> None:
    both = CHAT | {"max_tokens": 5, "max_completion_tokens": 6}
    reply = post("/v1/chat/completions", both)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "max_tokens"
    assert post("/v1/chat/completions", both | {"max_tokens": 6}).json()["usage"] == {
        "prompt_tokens": 29,
        "completion_tokens": 6,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    # Without a length a chat may fill the model, a completion makes 16 or what is left.
    chat = post("/v1/chat/completions", CHAT | {"ignore_eos": True}).json()
    assert chat["usage"]["total_tokens"] == MAX_MODEL_LEN
    completion = post("/v1/completions", {"prompt": "x" * (MAX_MODEL_LEN - 3)}).json()
    assert completion["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/completions", {"n": 2, "best_of": 1}, "best_of"),
        ("/v1/completions", {"best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"best_of": 129}, "best_of"),
        ("/v1/completions", {"logprobs": 21}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {"logprobs": 1}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {"echo": True}, "echo"),
        ("/v1/completions", {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/chat/completions", {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (
            "/v1/chat/completions",
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_refusals_of_one_route(path: str, change: dict[str, Any], param: str) -> None:
    reply = post(path, ROUTES[path] | change)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_events_to_the_letter() -> None:
    reply = post("/v1/completions", COMPLETION | {"stream": True, "max_tokens": 2})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first, second = (json.loads(event.removeprefix("data: ")) for event in events[:2])
    assert first.pop("id") == second.pop("id")
    assert first.pop("created") <= second.pop("created")
    assert first == {
        "model": "letters",
        "object": "text_completion",
        "system_fingerprint": first["system_fingerprint"],
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
    }
    assert second["choices"][0] == {
        "index": 0, "text": " ", "logprobs": None, "finish_reason": "length",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
)
def test_every_event_can_hold_the_usage_so_far(path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = post(path, body | {"stream": True, "max_tokens": 3, "stream_options": options})
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    counts = [json.loads(line)["usage"]["completion_tokens"] for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_every_completion_begins_before_there_is_a_token() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = CHAT | {"stream": True, "n": 3, "max_tokens": 2, "stream_options": options}
    lines = post("/v1/chat/completions", body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    heads = [chunk["choices"][0] for chunk in chunks[:3]]
    assert [head["index"] for head in heads] == [0, 1, 2]
    assert all(head["delta"] == {"role": "assistant", "content": ""} for head in heads)
    assert all(chunk["usage"]["completion_tokens"] == 0 for chunk in chunks[:3])
    assert all(chunk["usage"]["prompt_tokens"] == 29 for chunk in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_token_ids_beside_their_text() -> None:
    ids = {"return_token_ids": True, "max_tokens": 3}
    prompt, text = list(b"What is AI?"), list(b"a b")
    for prompts in (["What is AI?", "x"], [prompt, [120]]):
        reply = post("/v1/completions", COMPLETION | ids | {"prompt": prompts}).json()
        assert [one["prompt_token_ids"] for one in reply["choices"]] == [prompt, [120]]
        assert reply["choices"][0]["token_ids"] == text
    chat = post("/v1/chat/completions", CHAT | ids).json()
    chat_prompt = list(b"user: What is AI?\nassistant: ")
    assert chat["prompt_token_ids"] == chat_prompt
    assert chat["choices"][0]["token_ids"] == list(b"A b")
    for path, body in ROUTES.items():
        lines = post(path, body | ids | {"stream": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        told = [one for chunk in chunks for one in chunk["choices"][0].get("token_ids", ())]
        assert told == (text if "prompt" in body else list(b"A b"))
        first = chunks[0] if "messages" in body else chunks[0]["choices"][0]
        assert first["prompt_token_ids"] == (prompt if "prompt" in body else chat_prompt)
        assert "prompt_token_ids" not in json.dumps(chunks[1:])


def test_prompt_logprobs_as_vllm_gives_them() -> None:
    body = {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 2}
    choice = post("/v1/completions", body).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None and len(choice["text"]) == 1
    for token, entry in zip(b"bc", others, strict=True):
        own = entry[str(token)]
        assert own["decoded_token"] == chr(token) and own["rank"] == 1 and own["logprob"] < 0
        assert sorted(one["rank"] for one in entry.values()) == [1, 2]
    chat = post("/v1/chat/completions", CHAT | {"max_tokens": 1, "prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    # An echo's own list is as long as asked for.
    both = body | {"echo": True, "logprobs": 1, "prompt_logprobs": 3}
    choice = post("/v1/completions", both).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 4
    assert {len(one["top_logprobs"]) for one in [choice["logprobs"]]} == {4}
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:3])
    assert all(len(entry) == 3 for entry in choice["prompt_logprobs"][1:])


def test_an_echo_of_tokens_keeps_special_ones() -> None:
    prompt = [256, 97, 256, 98]
    body = {"prompt": prompt, "echo": True, "max_tokens": 2, "temperature": 0, "logprobs": 0}
    choice = post("/v1/completions", body).json()["choices"][0]
    assert choice["text"].startswith("<end>a<end>b") and len(choice["text"]) == 14
    assert choice["logprobs"]["text_offset"] == [0, 5, 6, 11, 12, 13]


def test_an_error_in_the_stream_is_an_event() -> None:
    for path, body in ROUTES.items():
        reply = post(path, body | {"stream": True}, fail_at_step=3)
        *_, error, done, _ = reply.text.split("\n\n")
        assert "rank 1 is gone" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        assert post(path, body, fail_at_step=3).status_code == 500


def test_all_answers_or_none_when_the_queue_is_full() -> None:
    async def go() -> tuple[httpx.Response, httpx.Response, dict[str, Any]]:
        config = {"max_num_seqs": 1, "max_queue_len": 3}
        async with client(delay=0.01, config=config) as (http, service):
            running = asyncio.create_task(http.post("/v1/completions", json=COMPLETION | {"n": 2}))
            while service.engine.num_open < 2:
                await asyncio.sleep(0.001)
            refused = await http.post("/v1/completions", json=COMPLETION | {"n": 3})
            served = await running
            while service.engine.engine.has_work:
                await asyncio.sleep(0.01)
            return refused, served, (await http.get("/health")).json()

    refused, served, health = asyncio.run(go())
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert served.status_code == 200 and len(served.json()["choices"]) == 2
    assert health["num_running"] == health["num_waiting"] == health["num_held_blocks"] == 0
    assert sum(health["num_finished"].values()) - health["num_finished"]["abort"] == 2


def test_more_answers_than_the_server_ever_holds_are_refused() -> None:
    config = {"max_num_seqs": 1, "max_queue_len": 7}
    asked = [
        ("/v1/completions", COMPLETION | {"n": 9}),
        ("/v1/completions", {"prompt": ["x"] * 9}),
        ("/v1/completions", {"prompt": ["x"] * 3, "n": 3}),
        ("/v1/chat/completions", CHAT | {"n": 9}),
        ("/v1/completions", {"prompt": ["x"] * 2, "n": 4, "max_tokens": 1}),
    ]
    replies = post_all(asked, config=config)
    assert [reply.status_code for reply in replies] == [400, 400, 400, 400, 200]
    params = [reply.json()["error"]["param"] for reply in replies[:4]]
    assert params == ["n", "prompt", "n", "n"]


def test_cached_tokens_are_reported() -> None:
    body = {"prompt": "x" * 100, "max_tokens": 1}
    first, second = post_all([("/v1/completions", body)] * 2)
    assert first.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}
    # What a prompt's first completion left for the others is no work saved by the cache.
    several = body | {"prompt": ["y" * 100, "x" * 100], "n": 3}
    usage = post_all([("/v1/completions", body), ("/v1/completions", several)])[1].json()["usage"]
    assert usage["prompt_tokens"] == 200
    assert usage["prompt_tokens_details"] == {"cached_tokens": 96}


def test_chat_continues_a_message() -> None:
    body = {
        "messages": [{"role": "assistant", "content": "A"}],
        "continue_final_message": True,
        "chat_template_kwargs": {"anything": 1},
    }
    assert post("/v1/chat/completions", body | {"max_tokens": 1}).status_code == 200


def test_the_wrk_scripts_body_is_served() -> None:
    """payload-1024.lua's fields, as vLLM's old clients send them."""
    body = {
        "model": "letters", "prompt": "x", "n": 1, "best_of": 1, "use_beam_search": False,
        "temperature": 0.0, "top_p": 1.0, "max_tokens": 4, "ignore_eos": True, "stream": False,
    }  # fmt: skip
    assert post("/v1/completions", body).json()["usage"]["completion_tokens"] == 4


def test_served_names() -> None:
    config = {"served_model_name": ("one", "two")}
    asked = [
        ("/v1/completions", COMPLETION | {"model": name}) for name in ("one", "two", "letters")
    ]
    replies = post_all([*asked, ("/v1/completions", COMPLETION)], config=config)
    assert [reply.status_code for reply in replies] == [200, 200, 404, 200]
    assert [replies[i].json()["model"] for i in (0, 1, 3)] == ["one", "two", "one"]


def test_any_name_where_the_flag_says_so() -> None:
    config = {"served_model_name": ("one", "two"), "any_model_name": True}
    asked = [
        ("/v1/completions", COMPLETION | {"model": name}) for name in ("two", "dummy", "gpt-4o")
    ]
    replies = post_all([*asked, ("/tokenize", {"prompt": "a", "model": "dummy"})], config=config)
    assert [reply.status_code for reply in replies] == [200] * 4
    assert [reply.json()["model"] for reply in replies[:3]] == ["two", "one", "one"]


def test_routes_in_every_spelling() -> None:
    async def go() -> None:
        async with client(config={"served_model_name": ("one", "two")}) as (http, _):
            for path, body in ROUTES.items():
                for spelling in (path, f"{path}/", path[3:], f"{path[3:]}/"):
                    reply = await http.post(spelling, json=body)
                    assert reply.status_code == 200, spelling
            for path in ("/tokenize", "/v1/tokenize", "/tokenize/", "/generate", "/v1/generate/"):
                assert (await http.post(path, json={"prompt": "a"})).status_code == 200, path
            for path in ("/health/", "/v1/health", "/metrics/", "/version/", "/docs/"):
                assert (await http.get(path)).status_code == 200, path
            for path in ("/v1/models", "/models/"):
                cards = (await http.get(path)).json()["data"]
                assert [(card["id"], card["root"]) for card in cards] == [
                    ("one", "letters"), ("two", "letters"),
                ]  # fmt: skip
            for path in ("/v1/models/two", "/models/two", "/models/two/"):
                assert (await http.get(path)).json()["id"] == "two", path
            for path in ("/v2/completions", "/v1", "/v1/", "/completions/x"):
                reply = await http.get(path)
                assert reply.status_code == 404 and path in reply.json()["error"]["message"]

    asyncio.run(go())


def test_where_the_model_lies_is_a_name_that_nobody_is_told(tmp_path: Path) -> None:
    """A client that knows it, as vLLM's do, is served; what is shown is the folder's own name."""
    folder = str(tmp_path / "llama")

    async def go() -> None:
        async with client(model_path=folder) as (http, _):
            for name in (folder, f"{folder}/", "llama"):
                body = COMPLETION | {"model": name}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
            body = COMPLETION | {"model": "other"}
            refused = await http.post("/v1/completions", json=body)
            assert refused.status_code == 404 and "served: llama" in refused.text
            names = await http.get("/v1/models")
            assert [card["id"] for card in names.json()["data"]] == ["llama"]
            others = [await http.get(path) for path in ("/metrics", "/health", "/v1/models/x")]
            for reply in (refused, names, *others):
                assert str(tmp_path) not in reply.text

    asyncio.run(go())


def test_tokenize_and_back() -> None:
    tokens = list("emoji \N{GRINNING FACE}".encode())
    asked = [
        ("/tokenize", {"prompt": "emoji \N{GRINNING FACE}"}),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}),
        ("/tokenize", {"messages": CHAT["messages"]}),
        ("/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": False}),
        ("/tokenize", {"prompt": ""}),
        ("/detokenize", {"tokens": tokens}),
        ("/detokenize", {"tokens": []}),
        ("/tokenize", {"prompt": "a\N{GRINNING FACE}", "return_token_strs": True}),
        ("/tokenize", {"messages": CHAT["messages"], "tools": [TOOL]}),
    ]
    config = {"tool_call_parser": "hermes"}
    replies = [reply.json() for reply in post_all(asked, config=config)]
    assert replies[0] == {"tokens": tokens, "count": 10, "max_model_len": MAX_MODEL_LEN}
    assert [reply.get("count") for reply in replies[1:5]] == [1, 29, 18, 0]
    assert replies[5:7] == [{"prompt": "emoji \N{GRINNING FACE}"}, {"prompt": ""}]
    assert replies[7]["token_strs"] == ["a", *["\N{REPLACEMENT CHARACTER}"] * 4]
    assert bytes(replies[8]["tokens"]).startswith(b"tool f\nuser: ")
    without = post("/tokenize", asked[-1][1])
    assert bytes(without.json()["tokens"]).startswith(b"user: ") and without.headers["x-warning"]
    refused = [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}),
        (
            "/tokenize",
            {
                "messages": CHAT["messages"],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
        ),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": "abc"}),
    ]
    replies = post_all(refused)
    assert [reply.status_code for reply in replies] == [400, 400, 404, 400, 400, 400]
    params = [reply.json()["error"]["param"] for reply in replies]
    assert params == ["prompt", "prompt", "model", "continue_final_message", "tokens", "tokens"]


def test_openapi_lists_the_routes() -> None:
    async def go() -> dict[str, Any]:
        async with client() as (http, _):
            assert (await http.get("/docs")).status_code == 200
            return (await http.get("/openapi.json")).json()

    document = asyncio.run(go())
    others = {
        name: document["components"]["schemas"][name]["additionalProperties"]
        for name in ("CompletionRequest", "ChatRequest", "ChatMessage", "ToolCall")
    }
    nothing = {"type": "null"}
    assert list(others.values()) == [nothing, nothing, True, True]
    paths = document["paths"]
    assert {"/generate/", "/generate_stream/", "/v1/completions", "/tokenize"} <= set(paths)


@pytest.mark.parametrize(
    "spelling",
    [
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x"]}}},
        {"type": "json_object", "schema": {"enum": ["x"]}},
        {"type": "json_schema", "schema": {"enum": ["x"]}},
        {"type": "json", "value": {"enum": ["x"]}},
        {"type": "json_schema", "value": {"name": "a", "schema": {"enum": ["x"]}}},
        {"type": "regex", "value": '"x"'},
    ],
)
def test_spellings_of_structured_output(spelling: dict[str, Any]) -> None:
    reply = post("/v1/chat/completions", CHAT | {"response_format": spelling})
    assert reply.json()["choices"][0]["message"]["content"] == '"x"'


@pytest.mark.parametrize(
    "spelling",
    [
        {"json_schema": {"enum": ["x"]}, "grammar": ""},
        {"json_schema": '{"enum": ["x"]}'},
        {"regex": '"x"'},
        {"ebnf": 'root ::= "\\"x\\""'},
        {"grammar": 'root ::= "\\"x\\""'},
    ],
)
def test_peers_own_fields_of_structured_output(spelling: dict[str, Any]) -> None:
    reply = post("/v1/chat/completions", CHAT | spelling)
    assert reply.json()["choices"][0]["message"]["content"] == '"x"'
