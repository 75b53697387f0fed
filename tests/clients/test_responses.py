"""openai, openai-agents and pydantic-ai on /v1/responses, at their defaults."""

from __future__ import annotations

import asyncio

import pytest

from tests.clients.conftest import KEY

openai = pytest.importorskip("openai", reason="no openai here")
agents = pytest.importorskip("agents", reason="no openai-agents here")
pydantic_ai = pytest.importorskip("pydantic_ai", reason="no pydantic-ai here")
if not hasattr(openai.OpenAI, "responses"):
    pytest.skip("this openai knows no responses", allow_module_level=True)

QUESTION = "What is AI?"
ANSWER = "branch of computer science"
ADD = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}


def make_client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0)


def test_a_response(base_url: str) -> None:
    client = make_client(base_url)
    response = client.responses.create(
        model="demo_model", input=QUESTION, temperature=0, max_output_tokens=24
    )
    assert ANSWER in response.output_text
    assert response.status == "incomplete" and response.usage.output_tokens == 24


def test_a_stream_brings_the_same(base_url: str) -> None:
    client = make_client(base_url)
    options = {"model": "demo_model", "input": QUESTION, "temperature": 0, "max_output_tokens": 24}
    with client.responses.stream(**options) as stream:
        events = list(stream)
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    assert text == events[-1].response.output_text
    assert text == client.responses.create(**options).output_text


def test_structured_text(base_url: str) -> None:
    from pydantic import BaseModel

    class Verdict(BaseModel):
        is_good: bool

    response = make_client(base_url).responses.parse(
        model="demo_model", input=QUESTION, text_format=Verdict, max_output_tokens=100
    )
    assert response.output_parsed.is_good in (True, False)


def test_a_call_and_its_output(calling_url: str) -> None:
    client = make_client(calling_url)
    items: list[object] = [{"role": "user", "content": "1 + 2?"}]
    response = client.responses.create(model="letters", input=items, tools=[ADD])
    (call,) = response.output
    assert (call.name, call.arguments) == ("add", '{"a": 1, "b": 2}')
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "3"}]
    response = client.responses.create(model="letters", input=items, tools=[ADD])
    assert response.output_text == "It is 3."


def test_refusals_have_their_own_kinds(base_url: str) -> None:
    client = make_client(base_url)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="demo_model", input="x", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").responses.create(model="demo_model", input="x")


@pytest.mark.parametrize("streams", [False, True])
def test_an_agent(calling_url: str, streams: bool) -> None:
    agents.set_tracing_disabled(True)

    @agents.function_tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    async def go() -> str:
        client = openai.AsyncOpenAI(base_url=calling_url, api_key=KEY, max_retries=0)
        model = agents.OpenAIResponsesModel(model="letters", openai_client=client)
        agent = agents.Agent(name="adder", model=model, tools=[add])
        if not streams:
            return (await agents.Runner.run(agent, "1 + 2?", max_turns=3)).final_output
        run = agents.Runner.run_streamed(agent, "1 + 2?", max_turns=3)
        async for _ in run.stream_events():
            pass
        return run.final_output

    assert asyncio.run(go()) == "It is 3."


def test_pydantic_ai(calling_url: str) -> None:
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=calling_url, api_key=KEY)
    agent = pydantic_ai.Agent(OpenAIResponsesModel("letters", provider=provider))

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    assert agent.run_sync("1 + 2?").output == "It is 3."
