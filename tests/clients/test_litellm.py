"""litellm against the server: chat, stream, text, tools, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.conftest import KEY

litellm = pytest.importorskip("litellm", reason="no litellm here")

QUESTION = "What is AI?"
ANSWER = "branch of computer science"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
ADD_CHOICE = {"type": "function", "function": {"name": "add"}}


def ask(base_url: str, text: str = QUESTION, model: str = "demo_model", **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    settings = {"api_base": base_url, "api_key": KEY, "temperature": 0, "num_retries": 0} | options
    return litellm.completion(f"openai/{model}", messages=messages, **settings)


def ask_for_call(base_url: str, streams: bool, **options: Any) -> Any:
    """The choice that holds a call, put together by litellm if it was streamed."""
    reply = ask(base_url, "1 + 2?", stream=streams, **options)
    if streams:
        reply = litellm.stream_chunk_builder(list(reply))
    return reply.choices[0]


def test_chat(base_url: str) -> None:
    reply = ask(base_url, max_tokens=24)
    assert ANSWER in reply.choices[0].message.content
    assert reply.usage.completion_tokens == 24


def test_a_stream_brings_the_same(base_url: str) -> None:
    chunks = list(ask(base_url, stream=True, max_tokens=24))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(base_url, max_tokens=24).choices[0].message.content


@pytest.mark.parametrize("streams", [False, True])
def test_a_forced_call(base_url: str, streams: bool) -> None:
    choice = ask_for_call(base_url, streams, tools=[ADD], tool_choice=ADD_CHOICE)
    (call,) = choice.message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments)["a"] in range(10)


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_of_the_models_own_accord(calling_url: str, streams: bool) -> None:
    choice = ask_for_call(calling_url, streams, tools=[ADD], model="letters")
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1, "b": 2}')
    assert choice.finish_reason == "tool_calls"


def test_completion_of_text(base_url: str) -> None:
    reply = litellm.text_completion(
        prompt=QUESTION,
        model="text-completion-openai/demo_model",
        api_base=base_url,
        api_key=KEY,
        temperature=0,
        max_tokens=24,
    )
    assert ANSWER in reply.choices[0].text


def test_refusals_have_their_own_kinds(base_url: str) -> None:
    with pytest.raises(litellm.AuthenticationError):
        ask(base_url, api_key="wrong")
    with pytest.raises(litellm.BadRequestError):
        ask(base_url, max_tokens=10**6)
