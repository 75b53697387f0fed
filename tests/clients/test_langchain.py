"""langchain-openai against the server: chat, stream, usage, tools, structured output, a refusal."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from tests.clients.conftest import KEY

langchain_openai = pytest.importorskip("langchain_openai", reason="no langchain-openai here")

QUESTION = "What is AI?"
ANSWER = "branch of computer science"


def make(base_url: str, model: str = "demo_model", **options: Any) -> Any:
    settings = {"api_key": KEY, "model": model, "temperature": 0, "max_retries": 0} | options
    return langchain_openai.ChatOpenAI(base_url=base_url, **settings)


def add(a: Literal[1, 2], b: Literal[1, 2]) -> int:
    """Add two numbers."""
    return a + b


def test_chat(base_url: str) -> None:
    message = make(base_url, max_tokens=24).invoke(QUESTION)
    assert ANSWER in message.content
    assert message.usage_metadata["output_tokens"] == 24
    assert message.response_metadata["finish_reason"] == "length"


def test_a_stream_brings_the_same_and_its_usage(base_url: str) -> None:
    model = make(base_url, stream_usage=True, max_tokens=24)
    chunks = list(model.stream(QUESTION))
    assert len(chunks) > 10
    assert "".join(chunk.content for chunk in chunks) == model.invoke(QUESTION).content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 24


@pytest.mark.parametrize("streams", [False, True])
def test_a_forced_call(base_url: str, streams: bool) -> None:
    # Strict and with numbers to choose from: the demo model has not learned when to stop.
    model = make(base_url, streaming=streams).bind_tools([add], tool_choice="add", strict=True)
    (call,) = model.invoke("1 + 2?").tool_calls
    assert call["name"] == "add"
    assert {call["args"][name] for name in "ab"} <= {1, 2}


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_of_the_models_own_accord(calling_url: str, streams: bool) -> None:
    model = make(calling_url, "letters", streaming=streams)
    (call,) = model.bind_tools([add]).invoke("1 + 2?").tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 1, "b": 2})


def test_structured_output(base_url: str) -> None:
    import pydantic

    class Trip(pydantic.BaseModel):
        city: Literal["Berlin", "Bern"]
        days: int = pydantic.Field(ge=1, le=30)

    model = make(base_url, temperature=1, seed=4).with_structured_output(Trip)
    assert isinstance(model.invoke("Where to?"), Trip)


def test_a_batch(base_url: str) -> None:
    questions = ["Define dog.", QUESTION, "Define cat.", QUESTION]
    answers = [one.content for one in make(base_url, max_tokens=12).batch(questions)]
    assert answers[1] == answers[3] and len(set(answers)) == 3


def test_a_wrong_key_is_an_authentication_error(base_url: str) -> None:
    from openai import AuthenticationError

    with pytest.raises(AuthenticationError):
        make(base_url, api_key="wrong").invoke(QUESTION)
