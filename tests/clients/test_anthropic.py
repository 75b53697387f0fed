"""The anthropic SDK, and pydantic-ai over it, on Anthropic's routes."""

from __future__ import annotations

import pytest

from tests.clients.conftest import KEY

anthropic = pytest.importorskip("anthropic", reason="no anthropic here")
pydantic_ai = pytest.importorskip("pydantic_ai", reason="no pydantic-ai here")

ANSWER = "branch of computer science"
ASK = {
    "model": "demo_model",
    "max_tokens": 24,
    "messages": [{"role": "user", "content": "What is AI?"}],
    "extra_body": {"temperature": 0},
}
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}


def make_client(base_url: str) -> anthropic.Anthropic:
    root = base_url.removesuffix("/v1")
    return anthropic.Anthropic(base_url=root, api_key=KEY, max_retries=0)


def test_a_message(base_url: str) -> None:
    message = make_client(base_url).messages.create(**ASK)
    assert ANSWER in message.content[0].text
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 24)


def test_a_stream_brings_the_same(base_url: str) -> None:
    client = make_client(base_url)
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert message.content[0].text == text == client.messages.create(**ASK).content[0].text
    assert message.usage.output_tokens == 24


def test_stop_sequences(base_url: str) -> None:
    message = make_client(base_url).messages.create(**ASK, stop_sequences=["computer"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "computer")


def test_count_tokens(base_url: str) -> None:
    client = make_client(base_url)
    counted = client.messages.count_tokens(model="demo_model", messages=ASK["messages"])
    usage = client.messages.create(**ASK).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_and_its_result(calling_url: str, streams: bool) -> None:
    client = make_client(calling_url)
    user = {"role": "user", "content": "1 + 2?"}
    options = {"model": "letters", "max_tokens": 200, "tools": [ADD]}
    if streams:
        with client.messages.stream(**options, messages=[user]) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**options, messages=[user])
    (call,) = message.content
    assert (call.name, call.input, message.stop_reason) == ("add", {"a": 1, "b": 2}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    messages = [user, {"role": "assistant", "content": message.content},
                {"role": "user", "content": [result]}]  # fmt: skip
    answer = client.messages.create(**options, messages=messages)
    assert answer.content[0].text == "It is 3."


def test_refusals_have_their_own_kinds(base_url: str) -> None:
    client = make_client(base_url)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ASK | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**ASK | {"max_tokens": 0})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**ASK)


def test_pydantic_ai(calling_url: str) -> None:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    root = calling_url.removesuffix("/v1")
    client = anthropic.AsyncAnthropic(base_url=root, api_key=KEY, max_retries=0)
    model = AnthropicModel("letters", provider=AnthropicProvider(anthropic_client=client))
    agent = pydantic_ai.Agent(model)

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    assert agent.run_sync("1 + 2?").output == "It is 3."
