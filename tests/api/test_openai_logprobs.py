"""Logprobs, best_of, bias and structured outputs through the official `openai` package."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pydantic
import pytest

from tests.api.conftest import LiveServer
from tests.fakes import ByteTokenizer, logprob, logprobs

pytestmark = pytest.mark.live

MODEL = "letters"
PROMPT = "What is AI?"
QUESTION = {"role": "user", "content": PROMPT}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def spell(token: int) -> str:
    return ByteTokenizer().token_bytes(token).decode("utf-8", "replace")


def test_completion_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    (choice,) = client.completions.create(**asked).choices
    assert choice.text == "a branch"
    shape = choice.logprobs
    assert shape.tokens == list("a branch")
    assert shape.text_offset == list(range(8))
    assert len(shape.token_logprobs) == 8 and all(value < 0 for value in shape.token_logprobs)
    for token, value, top in zip(
        shape.tokens, shape.token_logprobs, shape.top_logprobs, strict=True
    ):
        assert top[token] == value and len(top) == 2
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [value for chunk in chunks for value in getattr(chunk.logprobs, name)]
        assert parts == getattr(shape, name)


def test_no_alternatives_are_listed_for_0(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2, logprobs=0)
    assert [list(top) for top in reply.choices[0].logprobs.top_logprobs] == [
        [token] for token in reply.choices[0].logprobs.tokens
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_scores_the_prompt_as_lm_eval_asks(
    client: openai.OpenAI, max_tokens: int, stream: bool
) -> None:
    """Token ids, several prompts, the first token null."""
    prompts = [list(PROMPT.encode()), [65], list("h\N{EARTH GLOBE EUROPE-AFRICA}".encode())]
    reply = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, seed=1234,
        temperature=0, stream=stream,
    )  # fmt: skip
    pieces: dict[int, list] = {0: [], 1: [], 2: []}
    for part in reply if stream else [reply]:
        for choice in part.choices:
            pieces[choice.index].append(choice)
    for index, prompt in enumerate(prompts):
        text = "".join(piece.text for piece in pieces[index])
        assert text.startswith(bytes(prompt).decode())
        shapes = [piece.logprobs for piece in pieces[index]]
        tokens = [token for shape in shapes for token in shape.tokens]
        values = [value for shape in shapes for value in shape.token_logprobs]
        tops = [top for shape in shapes for top in shape.top_logprobs]
        assert len(tokens) == len(values) == len(tops) == len(prompt) + max_tokens
        assert tokens[: len(prompt)] == [spell(token) for token in prompt]
        assert values[0] is None and tops[0] is None
        assert all(value is not None for value in values[1:])
        offsets = [offset for shape in shapes for offset in shape.text_offset]
        if index < 2:
            assert offsets == list(range(len(text)))
        else:
            assert offsets[:5] == [0, 1, 1, 1, 1] and offsets[5:6] in ([], [2])
    if not stream:
        assert reply.usage.completion_tokens == 3 * max_tokens


def test_the_values_are_those_of_the_runner(client: openai.OpenAI) -> None:
    """They are hashes of integers, which are the same in every process."""
    prompt = list(b"echo me")
    reply = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=0, logprobs=3, echo=True
    )
    shape = reply.choices[0].logprobs
    for index in range(1, len(prompt)):
        expected = logprobs(prompt[:index], prompt[index], 3)
        assert shape.token_logprobs[index] == pytest.approx(expected.logprob)
        assert shape.top_logprobs[index] == {spell(token): value for token, value in expected.top}


def test_chat_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    asked = {
        "model": MODEL, "messages": [QUESTION], "temperature": 0, "logprobs": True,
        "top_logprobs": 3,
    }  # fmt: skip
    (choice,) = client.chat.completions.create(**asked).choices
    content = choice.logprobs.content
    *text, end = [entry.token for entry in content]
    assert "".join(text) == choice.message.content == "A branch of computer science."
    assert end == "<end>"  # the model chose it, the text does not show it
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (
            entry.token, entry.logprob,
        )  # fmt: skip
    stream = client.chat.completions.create(**asked, stream=True)
    parts = [chunk.choices[0] for chunk in stream]
    streamed = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert streamed == content
    plain = client.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0)
    assert plain.choices[0].logprobs is None


def test_best_of_returns_the_likeliest_per_token(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": ["x", "y"], "max_tokens": 6, "seed": 3, "temperature": 1}
    sampled = client.completions.create(**asked, n=5, logprobs=0)
    best = client.completions.create(**asked, n=2, best_of=5)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    for prompt in range(2):
        choices = sampled.choices[5 * prompt : 5 * prompt + 5]
        means = {
            choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens)
            for choice in choices
        }
        expected = sorted(means, key=means.get, reverse=True)[:2]
        assert [choice.text for choice in best.choices[2 * prompt : 2 * prompt + 2]] == expected
    assert best.usage.completion_tokens == 2 * 5 * 6 and best.usage.prompt_tokens == 2


def test_logit_bias(client: openai.OpenAI) -> None:
    for bias, text in (({"113": 100}, "qqqq"), ({"113": 1.5}, "a br")):
        reply = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias=bias
        )
        assert reply.choices[0].text == text


class Person(pydantic.BaseModel):
    """What a client may ask for."""

    name: Literal["Ada", "Grace"]
    age: int = pydantic.Field(ge=0, le=150)
    tags: list[Literal["a", "b"]] = pydantic.Field(max_length=3)
    is_alive: bool


def test_json_schema_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    for seed in range(5):
        reply = client.chat.completions.parse(
            model=MODEL, messages=[QUESTION], response_format=Person, max_tokens=400, seed=seed
        )
        (choice,) = reply.choices
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Person)
    with client.chat.completions.stream(
        model=MODEL, messages=[QUESTION], response_format=Person, max_tokens=400
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    "form",
    [
        {"guided_choice": ["red", 'a "b"\n', "\N{GRINNING FACE}"]},
        {"guided_regex": "[0-9]{3}-[a-c]{2}"},
        {"guided_grammar": 'root ::= ("yes" | "no") "!"'},
        {"guided_grammar": 'start: ("yes" | "no") "!"'},
        {"guided_json": {"enum": [1, "two", None]}},
        {"guided_json": '{"enum": [1, "two", null]}'},
        {"structured_outputs": {"choice": ["red", "blue"]}},
        {"structured_outputs": {"json": {"type": "boolean"}}},
    ],
    ids=str,
)
def test_vllms_forms_on_all_routes(client: openai.OpenAI, form: dict) -> None:
    allowed = {
        "guided_choice": lambda text: text in ("red", 'a "b"\n', "\N{GRINNING FACE}"),
        "guided_regex": lambda text: len(text) == 6 and text[:3].isdigit() and text[3] == "-",
        "guided_grammar": lambda text: text in ("yes!", "no!"),
        "guided_json": lambda text: json.loads(text) in (1, "two", None),
        "structured_outputs": lambda text: text in ("red", "blue", "true", "false"),
    }[next(iter(form))]
    for seed in range(4):
        asked = {"model": MODEL, "max_tokens": 64, "seed": seed, "extra_body": form}
        completion = client.completions.create(prompt="x", **asked).choices[0]
        assert allowed(completion.text) and completion.finish_reason == "stop"
        chat = client.chat.completions.create(messages=[QUESTION], **asked).choices[0]
        assert allowed(chat.message.content)
        native = {"prompt": "x", "n_predict": 64, "temperature": 1.0, "seed": seed} | form
        reply = client.post("/../generate/", cast_to=object, body=native)
        assert allowed(reply["message"]["content"])


def test_fake_logprobs_depend_on_the_context() -> None:
    """The tests above compare: they would prove nothing with constant values."""
    assert len({logprob([number, 2], 5) for number in range(20)}) > 10
