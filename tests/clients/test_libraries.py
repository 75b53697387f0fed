"""Libraries of Python over the OpenAI routes: a question at their defaults, a choice where they
have structured output.

Those that want an older openai live in an environment of their own; each is skipped elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.clients.conftest import KEY

pydantic = pytest.importorskip("pydantic", reason="no clients here")

MODEL = "demo_model"
QUESTION = "What is AI?"
ANSWER = "branch of computer science"
SHORT = {"max_tokens": 24, "temperature": 0}


class Verdict(pydantic.BaseModel):
    verdict: Literal["yes", "no"]


@pytest.fixture(autouse=True)
def environment(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.setenv(name, base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_openai() -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(max_retries=0)
    messages = [{"role": "user", "content": QUESTION}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, **SHORT)
    assert ANSWER in reply.choices[0].message.content
    chunks = client.chat.completions.create(model=MODEL, messages=messages, stream=True, **SHORT)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content
    parsed = client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Verdict, max_tokens=60
    )
    assert parsed.choices[0].message.parsed.verdict in ("yes", "no")


def test_langgraph() -> None:
    pytest.importorskip("langgraph")
    agents = pytest.importorskip("langchain.agents")
    from langchain_openai import ChatOpenAI

    agent = agents.create_agent(ChatOpenAI(model=MODEL, **SHORT), tools=[])
    assert ANSWER in agent.invoke({"messages": [("user", QUESTION)]})["messages"][-1].content


def test_dspy(base_url: str) -> None:
    dspy = pytest.importorskip("dspy")
    model = dspy.LM(f"openai/{MODEL}", api_base=base_url, api_key=KEY, cache=False, **SHORT)
    assert ANSWER in model(QUESTION)[0]


def test_smolagents(base_url: str) -> None:
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel(MODEL, api_base=base_url, api_key=KEY)
    content = [{"type": "text", "text": QUESTION}]
    assert ANSWER in model([{"role": "user", "content": content}], **SHORT).content


def test_haystack(base_url: str) -> None:
    chat = pytest.importorskip("haystack.components.generators.chat")
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    generator = chat.OpenAIChatGenerator(
        api_key=Secret.from_token(KEY),
        model=MODEL,
        api_base_url=base_url,
        generation_kwargs=SHORT,
    )
    assert ANSWER in generator.run([ChatMessage.from_user(QUESTION)])["replies"][0].text


def test_outlines() -> None:
    outlines = pytest.importorskip("outlines")
    import openai

    model = outlines.from_openai(openai.OpenAI(max_retries=0), MODEL)
    assert ANSWER in model(QUESTION, **SHORT)
    text = model("Is a dog an animal?", Verdict, max_tokens=60)
    assert Verdict.model_validate_json(text).verdict in ("yes", "no")


def test_guidance(base_url: str) -> None:
    guidance = pytest.importorskip("guidance")
    from guidance.models import OpenAI

    program = OpenAI(MODEL, api_key=KEY, base_url=base_url)
    with guidance.user():
        program += QUESTION
    with guidance.assistant():
        program += guidance.gen("answer", **SHORT)
    assert ANSWER in program["answer"]


def test_llm(base_url: str, tmp_path: Path) -> None:
    """Simon Willison's command, with the server named in its file of models."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: demo, model_name: {MODEL}, api_base: {base_url}, api_key_name: demo}}\n"
    )
    (tmp_path / "keys.json").write_text(f'{{"demo": "{KEY}"}}')
    program = str(Path(sys.executable).with_name("llm"))
    options = ("-o", "max_tokens", "24", "-o", "temperature", "0")
    run = subprocess.run(
        [program, "-m", "demo", *options, QUESTION],
        env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ANSWER in run.stdout, run.stderr


def test_pydantic_ai_on_chat_completions() -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel

    agent = pydantic_ai.Agent(OpenAIChatModel(MODEL), model_settings=SHORT)
    assert ANSWER in agent.run_sync(QUESTION).output


def test_instructor() -> None:
    instructor = pytest.importorskip("instructor")
    import openai

    client = instructor.from_openai(openai.OpenAI(max_retries=0))
    verdict = client.chat.completions.create(
        model=MODEL,
        response_model=Verdict,
        messages=[{"role": "user", "content": "Is a dog an animal?"}],
        max_tokens=60,
    )
    assert verdict.verdict in ("yes", "no")


def test_llama_index(base_url: str) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    model = like.OpenAILike(
        model=MODEL, api_base=base_url, api_key=KEY, is_chat_model=True, max_retries=0, **SHORT
    )
    messages = [ChatMessage(role="user", content=QUESTION)]
    text = model.chat(messages).message.content
    assert ANSWER in text
    assert "".join(part.delta for part in model.stream_chat(messages)) == text
    assert ANSWER in model.complete(QUESTION).text


def test_crewai(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREWAI_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    crewai = pytest.importorskip("crewai")
    model = crewai.LLM(model=f"openai/{MODEL}", base_url=base_url, api_key=KEY, **SHORT)
    assert ANSWER in model.call(QUESTION)
    agent = crewai.Agent(role="reader", goal="answer", backstory="reads a dictionary", llm=model)
    assert agent.kickoff(QUESTION).raw
