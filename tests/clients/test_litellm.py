"""litellm against the server: chat, stream, text, tools, refusals."""

from __future__ import annotations

import pytest

from tests.clients.conftest import KEY

litellm = pytest.importorskip("litellm", reason="no litellm here")

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def ask(base_url: str, text: str = "What is AI?", **options):
    messages = [{"role": "user", "content": text}]
    settings = {"api_base": base_url, "api_key": KEY, "temperature": 0, "num_retries": 0} | options
    return litellm.completion("openai/letters", messages=messages, **settings)


def test_chat(base_url: str):
    reply = ask(base_url)
    assert reply.choices[0].message.content == "A branch of computer science."
    assert reply.usage.completion_tokens == 30


def test_stream(base_url: str):
    chunks = ask(base_url, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "A branch of computer science."


@pytest.mark.parametrize("streams", [False, True])
def test_tool_call(base_url: str, streams: bool):
    reply = ask(base_url, "1 + 2?", tools=[ADD], stream=streams)
    if streams:
        reply = litellm.stream_chunk_builder(list(reply))
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1, "b": 2}')
    assert reply.choices[0].finish_reason == "tool_calls"


def test_completion_of_text(base_url: str):
    reply = litellm.text_completion(
        prompt="What is AI?",
        model="text-completion-openai/letters",
        api_base=base_url,
        api_key=KEY,
        temperature=0,
        max_tokens=8,
    )
    assert reply.choices[0].text == "a branch"


def test_refusals_have_their_own_kinds(base_url: str):
    with pytest.raises(litellm.AuthenticationError):
        ask(base_url, api_key="wrong")
    with pytest.raises(litellm.BadRequestError):
        ask(base_url, max_tokens=10**6)
