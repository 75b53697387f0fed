"""langchain-openai against the server: chat, stream, usage, tools, a refusal."""

from __future__ import annotations

import pytest

from tests.clients.conftest import KEY

langchain_openai = pytest.importorskip("langchain_openai", reason="no langchain-openai here")


def make(base_url: str, **options):
    settings = {"api_key": KEY, "model": "letters", "temperature": 0, "max_retries": 0} | options
    return langchain_openai.ChatOpenAI(base_url=base_url, **settings)


def test_chat(base_url: str):
    message = make(base_url).invoke("What is AI?")
    assert message.content == "A branch of computer science."
    assert message.usage_metadata["output_tokens"] == 30
    assert message.response_metadata["finish_reason"] == "stop"


def test_stream_with_usage(base_url: str):
    chunks = list(make(base_url, stream_usage=True).stream("What is AI?"))
    assert "".join(chunk.content for chunk in chunks) == "A branch of computer science."
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 30


@pytest.mark.parametrize("streams", [False, True])
def test_tool_call(base_url: str, streams: bool):
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    message = make(base_url, streaming=streams).bind_tools([add]).invoke("1 + 2?")
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 1, "b": 2})


def test_a_wrong_key_is_an_authentication_error(base_url: str):
    from openai import AuthenticationError

    with pytest.raises(AuthenticationError):
        make(base_url, api_key="wrong").invoke("What is AI?")
