"""Tool calls and reasoning over HTTP: what the model is told, and what its completion becomes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from autotp_serving.api.openai.completion_parser import CompletionParsers
from autotp_serving.config import ServingConfig
from tests.api import service
from tests.fakes import ByteTokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASK = [{"role": "user", "content": "weather?"}]
ARGUMENTS = '{"city": "Berlin"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
BOOK = {
    "tool get_weather\nuser: weather?\nassistant: ": f"Let me see.\n{CALL}\n{CALL}",
    "user: weather?\nassistant: ": CALL,
    "user: think\nassistant: ": "<think>\nHm.\n</think>\n\nYes.",
}


@pytest.fixture(autouse=True)
def book(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BOOK", BOOK)


def post(body: dict[str, Any], **config: Any) -> httpx.Response:
    config = {"tool_call_parser": "hermes", "reasoning_parser": "think"} | config

    async def go() -> httpx.Response:
        async with service.client(config=config) as (http, _):
            return await http.post("/v1/chat/completions", json=body)

    return asyncio.run(go())


def choice(body: dict[str, Any], **config: Any) -> dict[str, Any]:
    reply = post({"temperature": 0} | body, **config)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def stream(body: dict[str, Any], **config: Any) -> tuple[dict[str, Any], str]:
    """A stream's message, put together as a client does, and its finish reason."""
    text = post({"temperature": 0, "stream": True} | body, **config).text
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for part in text.split("\n\n")[:-2]:
        (one,) = json.loads(part.removeprefix("data: "))["choices"]
        reason = one["finish_reason"]
        for name in ("content", "reasoning_content"):
            message[name] += one["delta"].get(name, "")
        for call in one["delta"].get("tool_calls", ()):
            if "id" in call:
                message["tool_calls"].append(call)
            else:
                function = message["tool_calls"][call["index"]]["function"]
                function["arguments"] += call["function"]["arguments"]
    return message, reason


def test_calls_come_back_as_calls():
    one = choice({"messages": ASK, "tools": TOOLS})
    assert one["finish_reason"] == "tool_calls"
    assert one["message"]["content"] == "Let me see."
    calls = one["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": ARGUMENTS}
    ] * 2
    assert calls[0]["id"] != calls[1]["id"] and calls[0]["type"] == "function"
    assert "index" not in calls[0]


def test_a_stream_says_the_same():
    message, reason = stream({"messages": ASK, "tools": TOOLS})
    assert (message["content"], reason) == ("Let me see.", "tool_calls")
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [ARGUMENTS] * 2
    assert [call["index"] for call in message["tool_calls"]] == [0, 1]


def test_one_call_where_no_parallel_ones_are_wanted():
    one = choice({"messages": ASK, "tools": TOOLS, "parallel_tool_calls": False})
    assert len(one["message"]["tool_calls"]) == 1


def test_without_tools_or_with_none_chosen_a_call_is_text():
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        one = choice({"messages": ASK} | body)
        assert (one["message"]["content"], one["finish_reason"]) == (CALL, "stop")
        assert "tool_calls" not in one["message"]


@pytest.mark.parametrize("name", ["get_weather", "other"])
def test_only_the_allowed_tools_are_offered(name: str) -> None:
    """The model is told of them alone, and a call of another one is text."""
    other = {"type": "function", "function": {"name": "other"}}
    named = {"type": "function", "function": {"name": name}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    service.BOOK["tool other\nuser: weather?\nassistant: "] = CALL
    one = choice({"messages": ASK, "tools": [TOOLS[0], other], "tool_choice": allowed})
    if name == "get_weather":
        assert len(one["message"]["tool_calls"]) == 2 and one["finish_reason"] == "tool_calls"
    else:
        assert (one["message"]["content"], one["finish_reason"]) == (CALL, "stop")


def test_an_answer_cut_short_says_length():
    one = choice({"messages": ASK, "tools": TOOLS, "max_tokens": 70})
    assert one["finish_reason"] == "length"
    assert ARGUMENTS.startswith(one["message"]["tool_calls"][0]["function"]["arguments"])


def test_reasoning_is_parted_from_the_completion():
    ask = {"messages": [{"role": "user", "content": "think"}]}
    message = choice(ask)["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    assert message["reasoning"] == "Hm."
    message, reason = stream(ask)
    assert (message["reasoning_content"], message["content"], reason) == ("Hm.", "Yes.", "stop")
    assert "<think>" in choice(ask, reasoning_parser="none")["message"]["content"]


def test_calls_and_results_of_earlier_turns_reach_the_template(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def render(self: ByteTokenizer, messages: Any, options: Any) -> str:
        seen.append((messages, options))
        return "a"

    monkeypatch.setattr(ByteTokenizer, "render_chat", render)
    call = {"id": "c1", "type": "function",
            "function": {"name": "get_weather", "arguments": ARGUMENTS}}  # fmt: skip
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    choice({"messages": messages, "tools": TOOLS, "max_tokens": 1})
    ((shown, options),) = seen
    assert shown[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Berlin"}
    assert shown[2] == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    assert options["tools"] == TOOLS


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
         "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}}},
         "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": []}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "any", "tools": [{"type": "function", "function": {"name": "f"}}]}}},
         "tool_choice"),
        ({"tools": [{"type": "function", "function": {
            "name": "f", "strict": True, "parameters": {"type": "array"}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {
            "name": "f", "strict": True, "parameters": {"not": {"required": ["a"]}}}}]}, "tools"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": 5}}]}]},
         "messages.0.tool_calls.0.function.arguments"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str):
    reply = post({"messages": ASK} | body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_a_model_that_knows_no_tools_answers_without_them() -> None:
    for tool_choice in ("auto", "none", None):
        body = {"messages": ASK, "tools": TOOLS, "tool_choice": tool_choice, "temperature": 0}
        reply = post(body, tool_call_parser="auto")
        assert reply.status_code == 200
        assert "--tool-call-parser" in reply.headers["x-warning"]
        message = reply.json()["choices"][0]["message"]
        assert message["content"] == CALL and "tool_calls" not in message
    assert "x-warning" not in post({"messages": ASK, "tools": TOOLS}).headers


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function":
                                                      {"name": "get_weather"}}])  # fmt: skip
def test_a_model_that_knows_no_tools_can_be_made_to_call_one(
    tool_choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    render = ByteTokenizer.render_chat

    def note(self: ByteTokenizer, messages: Any, options: Any) -> str:
        seen.append((messages, options))
        return render(self, messages, options)

    monkeypatch.setattr(ByteTokenizer, "render_chat", note)
    schema = {"type": "object", "properties": {"city": {"enum": ["Bern"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    function = TOOLS[0]["function"] | {"parameters": schema}
    tools = [{"type": "function", "function": function}]
    body = {"messages": ASK, "tools": tools, "tool_choice": tool_choice, "max_tokens": 100}
    body |= {"parallel_tool_calls": False}
    reply = post(body | {"seed": 3}, tool_call_parser="auto", reasoning_parser="none")
    assert "x-warning" not in reply.headers
    one = reply.json()["choices"][0]
    (call,) = one["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    ((messages, options),) = seen
    assert "tools" not in options
    assert '"description": "Weather now"' in messages[0]["content"]
    assert messages[0]["content"].endswith("weather?")


def test_parsers_follow_the_chat_template():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{{ <think> </think> <tool_call> }}"
    config = ServingConfig(model_path="fake")
    parsers = CompletionParsers(tokenizer, config)
    assert parsers.call_format(is_required=False) == "hermes"
    assert parsers.reasoning([]) == "possible"
    assert parsers.make("possible", {"f": None}, None) is not None
    begun = parsers.make(parsers.reasoning(tokenizer.encode("a\n<think>\n")), {}, None)
    assert begun.add("a</think>b", is_last=True) == [{"reasoning_content": "a"}, {"content": "b"}]
    tokenizer.chat_template = "plain"
    plain = CompletionParsers(tokenizer, config)
    assert plain.reasoning([]) is None
    assert plain.make(None, {"f": None}, None) is None
    assert plain.call_format(is_required=False) is None
    assert plain.call_format(is_required=True) == "hermes"
