"""The official `openai` package is the judge of /v1: sync, async, streams, errors."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.api.conftest import LiveServer

pytestmark = pytest.mark.live

MODEL = "letters"
ANSWER = "A branch of computer science."
QUESTION = {"role": "user", "content": "What is AI?"}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def async_client(live: LiveServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["letters", "fake/letters"]
    assert client.models.retrieve("letters").owned_by == "autotp-serving"
    assert client.models.retrieve("fake/letters").id == "fake/letters"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="What is AI?", max_tokens=64, temperature=0
    )
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert reply.model == MODEL and reply.system_fingerprint
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.index) == (
        "a branch of computer science", "stop", 0,
    )  # fmt: skip
    assert choice.logprobs is None
    # 28 letters and the end token.
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 29)
    assert reply.usage.total_tokens == 40


def test_completion_makes_16_tokens_by_default(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="What is AI?", temperature=0)
    assert reply.choices[0].text == "a branch of comp"
    assert reply.choices[0].finish_reason == "length"


def test_completion_of_several_prompts_in_every_form(client: openai.OpenAI) -> None:
    texts = ["What is AI?", "emoji"]
    tokens = [list(text.encode()) for text in texts]
    for prompt in (texts, tokens):
        reply = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.choices[0].text == "a branch of computer science"
        assert reply.choices[1].text.startswith("ab\N{GRINNING FACE}")
        assert reply.usage.prompt_tokens == 16
    reply = client.completions.create(model=MODEL, prompt=tokens[0], temperature=0, max_tokens=8)
    assert [choice.text for choice in reply.choices] == ["a branch"]


def test_completion_echo(client: openai.OpenAI) -> None:
    for prompt in ("What is AI?", list(b"What is AI?")):
        asked = {"model": MODEL, "prompt": prompt, "echo": True, "temperature": 0, "max_tokens": 8}
        reply = client.completions.create(**asked)
        assert reply.choices[0].text == "What is AI?a branch"
        parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert "".join(parts) == "What is AI?a branch"


def test_n_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": ["x", "y"], "n": 3, "max_tokens": 8, "temperature": 1.0}
    first, second = (client.completions.create(**asked, seed=5) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 6
    assert texts == [choice.text for choice in second.choices]
    assert [choice.index for choice in first.choices] == list(range(6))
    assert first.usage.prompt_tokens == 2 and first.usage.completion_tokens == 48


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="What is AI?",
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a branch of computer science"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 28 + ["stop"]
    assert {chunk.id for chunk in chunks} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == 29


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert reply.usage.completion_tokens == len(ANSWER) + 1


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[QUESTION],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + 30


def test_chat_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=[QUESTION], temperature=0) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_chat_with_several_roles_and_text_parts(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is AI?"}]},
            {"role": "user", "content": "now"},
        ],
        temperature=0,
        max_completion_tokens=50,
    )
    assert reply.choices[0].message.content == "Science."


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0)
    messages = [QUESTION, first.choices[0].message, QUESTION]
    again = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert again.usage.prompt_tokens > first.usage.total_tokens
    messages[1] = first.choices[0].message.model_dump()
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)


def test_tokenize_beside_v1(client: openai.OpenAI) -> None:
    tokens = client.post("/../tokenize", cast_to=object, body={"prompt": "emoji"})
    assert tokens["tokens"] == list(b"emoji") and tokens["count"] == 5


def test_stop(client: openai.OpenAI) -> None:
    for stop in ("computer", ["science", "computer"]):
        reply = client.completions.create(
            model=MODEL, prompt="What is AI?", max_tokens=64, temperature=0, stop=stop
        )
        assert reply.choices[0].text == "a branch of "
        assert reply.choices[0].finish_reason == "stop"
    reply = client.completions.create(
        model=MODEL,
        prompt="What is AI?",
        max_tokens=64,
        temperature=0,
        extra_body={"stop_token_ids": [ord("o")], "top_k": -1, "ignore_eos": True},
    )
    assert reply.choices[0].text == "a branch "


def test_errors_arrive_as_the_packages_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[QUESTION], max_tokens=5000)
    assert refused.value.param == "max_tokens"
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="not supported yet") as refused:
        client.chat.completions.create(model=MODEL, messages=[QUESTION], modalities=["audio"])
    assert refused.value.param == "modalities"


def test_async_and_many_at_once(async_client: openai.AsyncOpenAI) -> None:
    async def one(index: int) -> str:
        if index % 2:
            stream = await async_client.chat.completions.create(
                model=MODEL, messages=[QUESTION], temperature=0, stream=True
            )
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return "".join(parts)
        reply = await async_client.chat.completions.create(
            model=MODEL, messages=[QUESTION], temperature=0
        )
        return reply.choices[0].message.content

    async def go() -> list[str]:
        return await asyncio.gather(*(one(index) for index in range(24)))

    assert asyncio.run(go()) == [ANSWER] * 24


def test_closing_a_stream_frees_its_blocks(client: openai.OpenAI, live: LiveServer) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=3000, n=3, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    live.wait_for_health(
        lambda health: health["num_running"] == health["num_held_blocks"] == 0, 2.0
    )
