"""Anthropic's routes over HTTP: blocks out, blocks of earlier turns in, errors in their shape."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from autotp_serving.api.api_keys import ApiKeys
from autotp_serving.api.openai.reasoning_options import ReasoningOptions
from tests.api import service
from tests.api.dialects import SCHEMA, post, read_events
from tests.fakes import ByteTokenizer

TOOL = {"name": "get_weather", "description": "Weather now", "input_schema": SCHEMA}
USER = {"role": "user", "content": "weather?"}
ASK = {"messages": [USER], "tools": [TOOL], "max_tokens": 400, "temperature": 0}
TEXT = {"messages": [{"role": "user", "content": "What is AI?"}], "max_tokens": 64,
        "temperature": 0}  # fmt: skip


def create(body: dict[str, Any], **options: Any) -> dict[str, Any]:
    (reply,) = post("/v1/messages", body, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_text():
    message = create(TEXT)
    assert message["content"] == [{"type": "text", "text": "A branch of computer science."}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert (message["type"], message["role"], message["model"]) == (
        "message", "assistant", "letters",
    )  # fmt: skip
    usage = message["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (29, 30)


def test_a_system_prompt_in_blocks():
    blocks = [{"type": "text", "text": text} for text in ("Be brief.\n", "Be kind.")]
    system = [block | {"cache_control": {"type": "ephemeral"}} for block in blocks]
    assert create(TEXT | {"system": system})["content"][0]["text"] == "Science."


def test_thinking_text_and_a_call_are_blocks():
    message = create(ASK)
    thinking, text, call = message["content"]
    assert thinking["thinking"] == "Hm." and thinking["signature"]
    assert text == {"type": "text", "text": "Let me see."}
    assert (call["name"], call["input"]) == ("get_weather", {"city": "Berlin"})
    assert message["stop_reason"] == "tool_use"


def test_a_stream_says_the_same():
    (reply,) = post("/v1/messages", ASK | {"stream": True})
    events = read_events(reply.text)
    assert [event["type"] for event in events if "delta" not in event["type"]] == [
        "message_start", "ping", *["content_block_start", "content_block_stop"] * 3, "message_stop",
    ]  # fmt: skip
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(one.get("thinking", "") for one in deltas) == "Hm."
    assert "".join(one.get("text", "") for one in deltas) == "Let me see."
    assert "".join(one.get("partial_json", "") for one in deltas) == '{"city": "Berlin"}'
    (end,) = [event for event in events if event["type"] == "message_delta"]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] > 0
    assert events[0]["message"]["usage"]["input_tokens"] == end["usage"]["input_tokens"]


def test_a_turn_is_sent_back_as_it_came():
    content = create(ASK)["content"]
    for result in ("sunny", [{"type": "text", "text": "sunny"}]):
        answer = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": result}
        messages = [USER, {"role": "assistant", "content": content},
                    {"role": "user", "content": [answer]}]  # fmt: skip
        assert create(ASK | {"messages": messages})["content"][0]["text"] == "Sunny."


def test_what_the_template_sees(monkeypatch: pytest.MonkeyPatch):
    """Results first, failures named, system messages where they stand, text at the end gone on."""
    seen: list[Any] = []

    def render(self: ByteTokenizer, messages: Any, options: Any) -> str:
        seen.append((messages, options))
        return "a"

    monkeypatch.setattr(ByteTokenizer, "render_chat", render)
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": "no"}
    blocks = [{"type": "text", "text": "and?"}, result]
    call = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Berlin"}}
    messages = [
        USER,
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, call]},
        {"role": "user", "content": blocks},
        {"role": "system", "content": "Stay calm."},
        {"role": "assistant", "content": "Well,"},
    ]
    create(ASK | {"messages": messages, "max_tokens": 1})
    ((shown, options),) = seen
    assert [message["role"] for message in shown] == [
        "user", "assistant", "tool", "user", "system", "assistant",
    ]  # fmt: skip
    assert shown[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Berlin"}
    assert shown[2]["content"] == "Error: no"
    assert options["continue_final_message"] and not options["add_generation_prompt"]


def test_stop_sequences_tell_which_one_it_was():
    message = create(TEXT | {"stop_sequences": ["zebra", "of "]})
    assert message["content"][0]["text"] == "A branch "
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "of ")


def test_lengths():
    assert create(TEXT | {"max_tokens": 5})["stop_reason"] == "max_tokens"
    other = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 32000}
    message = create(other)  # as agents ask, whatever the model takes
    assert message["stop_reason"] == "model_context_window_exceeded"
    usage = message["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == service.MAX_MODEL_LEN


def test_tokens_that_were_cached_are_counted_apart():
    body = {"messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 2}
    replies = post("/v1/messages", body, body)
    first, second = (reply.json()["usage"] for reply in replies)
    assert first["cache_read_input_tokens"] == 0 < second["cache_read_input_tokens"]
    assert second["input_tokens"] + second["cache_read_input_tokens"] == first["input_tokens"]


def test_count_tokens():
    body = {"messages": [USER], "tools": [TOOL], "system": "Be brief."}
    (reply,) = post("/v1/messages/count_tokens", body)
    prompt = "tool get_weather\nsystem: Be brief.\nuser: weather?\nassistant: "
    assert reply.json() == {"input_tokens": len(prompt)}


def test_forced_calls():
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        message = create(ASK | {"tool_choice": choice}, config={"reasoning_parser": "none"})
        assert {block["type"] for block in message["content"]} == {"tool_use"}
    message = create(ASK | {"tool_choice": {"type": "none"}, "max_tokens": 9})
    assert {block["type"] for block in message["content"]} <= {"text", "thinking"}


def test_what_claude_code_sends_is_taken():
    body = TEXT | {
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "{}"}, "max_tokens": 32000, "stream": True,
        "tools": [{**TOOL, "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
    }  # fmt: skip
    (reply,) = post("/v1/messages?beta=true", body, headers={"anthropic-version": "2023-06-01"})
    assert reply.status_code == 200
    assert set(reply.headers["x-ignored-fields"].split(", ")) == {
        "context_management", "thinking", "output_config.effort",
    }  # fmt: skip


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type: "),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
         "messages.0.content.0.tool_use_id: is missing"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]}, "messages: "),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type: "),
        ({"tools": [{"name": "a b"}]}, "tools: "),
        ({"tool_choice": {"type": "any"}}, "tool_choice: "),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens: "),
        ({"mcp_servers": [{}]}, "mcp_servers: "),
        ({"foo": 1}, "foo: is not a field"),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}},
         "output_config.format: "),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], words: str):
    (reply,) = post("/v1/messages", TEXT | body)
    assert reply.status_code == 400
    error = reply.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(words)


def test_every_error_has_their_shape():
    (missing,) = post("/v1/messages", TEXT | {"model": "claude"})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    (stranger,) = post("/v1/messages", TEXT, config={"api_key": ["k"]})
    assert stranger.json()["error"]["type"] == "authentication_error"
    assert int(stranger.headers["content-length"]) == len(stranger.content)
    (large,) = post("/v1/messages/count_tokens", TEXT, config={"max_body_size": 16})
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    (other,) = post("/v1/chat/completions", {}, config={"api_key": ["k"]})
    assert other.json()["error"]["code"] == "invalid_api_key"


def test_a_failure_in_a_stream_is_its_last_event():
    (reply,) = post("/v1/messages", TEXT | {"stream": True}, fail_at_step=3)
    last = read_events(reply.text)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")


def test_a_key_as_their_clients_show_it():
    (reply,) = post("/v1/messages", TEXT, config={"api_key": ["k"]}, headers={"x-api-key": "k"})
    assert reply.status_code == 200
    keys = ApiKeys(["a", "b"])
    assert keys.find_tenant([(b"x-api-key", b"b")]) == "key 2"
    assert keys.find_tenant([(b"x-api-key", b"c")]) is None
    both = [(b"x-api-key", b"b"), (b"authorization", b"Bearer a")]
    assert keys.find_tenant(both) == "key 1"


def test_the_template_is_told_whether_to_think(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    tokenizer_template = "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}"

    def render(self: ByteTokenizer, messages: Any, options: Any) -> str:
        seen.append(options.get("enable_thinking"))
        return "a"

    monkeypatch.setattr(ByteTokenizer, "render_chat", render)
    inner = ByteTokenizer.__init__

    def init(self: ByteTokenizer) -> None:
        inner(self)
        self.chat_template = tokenizer_template

    monkeypatch.setattr(ByteTokenizer, "__init__", init)

    async def go() -> None:
        async with service.client() as (http, _):
            for thinking in (None, {"type": "adaptive"}, {"type": "disabled"}):
                body = TEXT | {"max_tokens": 1, "thinking": thinking}
                reply = await http.post("/v1/messages", json=body)
                assert "x-ignored-fields" not in reply.headers
            for effort in ("none", "high"):
                body = {"input": "x", "max_output_tokens": 1, "reasoning": {"effort": effort}}
                reply = await http.post("/v1/responses", json=body)
                assert ("x-ignored-fields" in reply.headers) == (effort == "high")

    asyncio.run(go())
    assert seen == [False, True, False, False, True]


def test_efforts_in_the_words_of_templates():
    options = ReasoningOptions("{{ reasoning_effort }} {{ thinking }}")
    assert options.for_template(True, "max") == {"thinking": True, "reasoning_effort": "high"}
    assert options.for_template(None, None) == {}
    assert ReasoningOptions("{% broken").for_template(True, "low") == {}
