"""Calls that have to come, and arguments that have to fit: both formats, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES
from autotp_serving.structured_output import ReasoningFormat
from tests.api import service
from tests.api.test_tools import ASK, post, stream
from tests.generated_schemas import check

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Bern"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1,
                               "maxItems": 3}},
    "required": ["numbers"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
NAMED = {"type": "function", "function": {"name": "add"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


PROMPT = "tool get_weather\ntool add\nuser: {}\nassistant: "
TOOL_FORMATS = pytest.mark.parametrize("tool_format", ["hermes", "llama3"])


def check_calls(message: dict[str, Any], names: set[str], num_calls: range) -> None:
    """The message is nothing but calls that fit."""
    calls = message["tool_calls"]
    assert len(calls) in num_calls
    assert not message["content"]
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function"
        assert call["function"]["name"] in names
        check(SCHEMAS[call["function"]["name"]], json.loads(call["function"]["arguments"]))


def ask(tool_format: str, *, thinks: bool = False, **body: Any) -> httpx.Response:
    config = {"tool_call_parser": tool_format, "reasoning_parser": "think" if thinks else "none"}
    return post({"messages": ASK, "tools": TOOLS} | body, **config)


CASES = pytest.mark.parametrize(
    ("options", "names", "num_calls", "reason"),
    [
        ({"tool_choice": "required"}, set(SCHEMAS), range(1, 99), "tool_calls"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, set(SCHEMAS), range(1, 2),
         "tool_calls"),
        ({"tool_choice": NAMED}, {"add"}, range(1, 2), "stop"),
        ({"tool_choice": allowed("required", "add")}, {"add"}, range(1, 99), "tool_calls"),
        ({"tool_choice": allowed("required", "get_weather", "add"), "parallel_tool_calls": False},
         set(SCHEMAS), range(1, 2), "tool_calls"),
    ],
)  # fmt: skip


@TOOL_FORMATS
@CASES
def test_the_call_comes_whatever_the_model_would_say(
    tool_format: str, options: dict[str, Any], names: set[str], num_calls: range, reason: str
) -> None:
    reply = ask(tool_format, **options, n=8, seed=11, max_tokens=400).json()
    for choice in reply["choices"]:
        check_calls(choice["message"], names, num_calls)
        assert choice["finish_reason"] == reason
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in reply["choices"]}) == 8


@TOOL_FORMATS
@CASES
def test_a_stream_brings_the_same_calls(
    tool_format: str, options: dict[str, Any], names: set[str], num_calls: range, reason: str
) -> None:
    body = {"messages": ASK, "tools": TOOLS, "max_tokens": 400, "seed": 5} | options
    whole = ask(tool_format, **body, temperature=0).json()["choices"][0]
    message, stream_reason = stream(body, tool_call_parser=tool_format, reasoning_parser="none")
    check_calls(message, names, num_calls)
    assert stream_reason == whole["finish_reason"] == reason
    told = [[call["function"] for call in one["tool_calls"]] for one in (message, whole["message"])]
    assert told[0] == told[1]


def test_several_calls_in_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = '{"numbers": [1, 2]}'
    hermes = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
    llama3 = f'{{"name": "add", "parameters": {arguments}}}'
    for tool_format, text in (("hermes", f"{hermes}\n{hermes}"), ("llama3", f"{llama3}; {llama3}")):
        monkeypatch.setattr(service, "BOOK", {PROMPT.format("weather?"): text})
        choice = ask(tool_format, tool_choice="required", temperature=0).json()["choices"][0]
        calls = choice["message"]["tool_calls"]
        assert [call["function"]["arguments"] for call in calls] == [arguments] * 2
        assert choice["finish_reason"] == "tool_calls"


@TOOL_FORMATS
def test_strict_tools_leave_the_model_free_to_talk_but_not_to_call_wrongly(
    tool_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = '{"name": "add", "%s": {"numbers": ["one"]}}'
    calls = {
        "hermes": f"Well.\n<tool_call>\n{wrong % 'arguments'}\n</tool_call>",
        "llama3": wrong % "parameters",
    }
    book = {
        PROMPT.format("talk"): "I would {rather} not.",
        PROMPT.format("call"): calls[tool_format],
    }
    monkeypatch.setattr(service, "BOOK", book)

    def say(text: str, **options: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0} | options
        return ask(tool_format, **body).json()["choices"][0]

    talk = say("talk", tools=STRICT)
    assert (talk["message"]["content"], talk["finish_reason"]) == ("I would {rather} not.", "stop")
    loose = say("call", max_tokens=200)
    assert json.loads(loose["message"]["tool_calls"][0]["function"]["arguments"]) == {
        "numbers": ["one"]
    }
    held = say("call", tools=STRICT, max_tokens=200, parallel_tool_calls=False)
    assert held["finish_reason"] == "tool_calls"
    (call,) = held["message"]["tool_calls"]
    check(ADD, json.loads(call["function"]["arguments"]))
    assert held["message"]["content"] == ("Well." if tool_format == "hermes" else None)


@TOOL_FORMATS
def test_structured_output_and_tools_go_together(tool_format: str, monkeypatch) -> None:
    """The model may call a tool, or else must keep to the form."""
    key = "arguments" if tool_format == "hermes" else "parameters"
    call = f'{{"name": "add", "{key}": {{"numbers": [2]}}}}'
    if tool_format == "hermes":
        call = f"<tool_call>\n{call}\n</tool_call>"
    book = {PROMPT.format("call"): call, PROMPT.format("talk"): '{"a":true}'}
    monkeypatch.setattr(service, "BOOK", book)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    def say(text: str, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        body = {"response_format": wanted, "temperature": 0, "max_tokens": 200} | options
        return ask(tool_format, messages=messages, **body).json()["choices"][0]["message"]

    assert say("talk")["content"] == '{"a":true}'
    assert say("call")["tool_calls"][0]["function"]["arguments"] == '{"numbers": [2]}'
    check_calls(say("talk", tool_choice=NAMED), {"add"}, range(1, 2))


@TOOL_FORMATS
@pytest.mark.parametrize("begins", ["<think>", ""])
def test_reasoning_comes_before_structured_output(
    tool_format: str, begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`begins`: what the completion begins with; where "", the template has written the tag."""
    close = "" if begins else "<think>"
    text = f"{begins}\nShall I add? {{</think>\n\nNo."
    book = {PROMPT.format("hm") + close: text, f"user: hm\nassistant: {close}": text}
    monkeypatch.setattr(service, "BOOK", book)
    render = service.ByteTokenizer.render_chat

    def begin(self: Any, messages: Any, options: Any) -> str:
        return render(self, messages, options) + close

    monkeypatch.setattr(service.ByteTokenizer, "render_chat", begin)
    body = {"messages": [{"role": "user", "content": "hm"}], "temperature": 0, "max_tokens": 400}
    reply = ask(tool_format, tool_choice="required", thinks=True, **body)
    message = reply.json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Shall I add? {"
    check_calls(message, set(SCHEMAS), range(1, 99))
    only_yes = {"response_format": {"type": "json_schema", "json_schema": {
        "name": "yes", "schema": {"const": "yes"}}}}  # fmt: skip
    reply = ask(tool_format, tools=[], thinks=True, **body, **only_yes)
    message = reply.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Shall I add? {", '"yes"')


@pytest.mark.parametrize(
    ("tool_format", "reasoning_parser"),
    [("glm45", "think"), ("gemma4", "gemma4"), ("mistral", "mistral"), ("harmony", "harmony")],
)
def test_reasoning_of_other_families_before_what_is_forced(
    tool_format: str, reasoning_parser: ReasoningFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    syntax = REASONING_SYNTAXES[reasoning_parser]
    text = f"{syntax.open}Shall I?{syntax.close}{syntax.next}{syntax.answer}Yes."
    book = {PROMPT.format("hm"): text, "user: hm\nassistant: ": text}
    monkeypatch.setattr(service, "BOOK", book)

    def say(**options: Any) -> dict[str, Any]:
        config = {"tool_call_parser": tool_format, "reasoning_parser": reasoning_parser}
        body = {"messages": [{"role": "user", "content": "hm"}], "temperature": 0,
                "max_tokens": 400, "thinking_budget": 20}  # fmt: skip
        return post(body | options, **config).json()["choices"][0]["message"]

    message = say(tools=TOOLS, tool_choice="required")
    assert message["reasoning_content"] == "Shall I?"
    check_calls(message, set(SCHEMAS), range(1, 99))
    wanted = {"structured_outputs": {"choice": ["Yes."]}}
    for message in (say(**wanted), say(tools=TOOLS, **wanted)):
        assert (message["reasoning_content"], message["content"]) == ("Shall I?", "Yes.")


def test_what_is_not_strict_takes_what_can_be_held() -> None:
    parameters = WEATHER | {"not": {"required": ["week"]}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    reply = ask("hermes", tools=tools, tool_choice="required", max_tokens=400)
    check_calls(reply.json()["choices"][0]["message"], {"get_weather"}, range(1, 99))


def test_a_function_without_parameters_takes_none() -> None:
    tools = [{"type": "function", "function": {"name": "stop_all"}}]
    reply = ask("llama3", tools=tools, tool_choice="required", parallel_tool_calls=False)
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {}


def test_a_call_cut_short_says_length() -> None:
    choice = ask("hermes", tool_choice=NAMED, max_tokens=45).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_a_tag_cut_short_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"numbers": [1]}}\n</tool_call>'
    monkeypatch.setattr(service, "BOOK", {PROMPT.format("weather?"): f"{call}\n{call}"})
    for length in (len(call) - 6, len(call), len(call) + 4):
        choice = ask("hermes", tool_choice="required", temperature=0, max_tokens=length)
        check_calls(choice.json()["choices"][0]["message"], {"add"}, range(1, 2))


def test_the_model_is_told_of_all_tools_and_of_nothing_else(monkeypatch) -> None:
    seen: list[Any] = []

    def render(self: Any, messages: Any, options: Any) -> str:
        seen.append(options["tools"])
        return "a"

    monkeypatch.setattr(service.ByteTokenizer, "render_chat", render)
    ask("hermes", tools=STRICT, tool_choice=NAMED, max_tokens=1)
    assert seen == [TOOLS]


def test_many_forced_calls_run_at_once() -> None:
    async def go() -> list[httpx.Response]:
        config = {"tool_call_parser": "hermes"}
        async with service.client(config=config) as (http, _):
            bodies = [
                {"messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 400,
                 "parallel_tool_calls": False, "seed": number}
                for number, choice in enumerate(("required", NAMED) * 8)
            ]  # fmt: skip
            posts = (http.post("/v1/chat/completions", json=body) for body in bodies)
            return await asyncio.gather(*posts)

    for reply in asyncio.run(go()):
        check_calls(reply.json()["choices"][0]["message"], set(SCHEMAS), range(1, 99))
