"""The native routes over the real engine: shapes, options, and a test per refusal."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from autotp_serving.api.native_schemas import GenerateReply
from autotp_serving.batch import SampleInput
from autotp_serving.request import SamplingParams
from tests.api.service import MAX_MODEL_LEN, Service, client
from tests.fakes import ByteTokenizer, generate, logprob, logprobs

PATHS = ("/generate", "/generate/", "/generate_stream", "/generate_stream/")


def post(path: str, body: Any, **options: Any) -> httpx.Response:
    """One request to a fresh service; the body is JSON, or bytes as they are."""

    async def go() -> httpx.Response:
        async with client(**options) as (http, _):
            if isinstance(body, bytes):
                return await http.post(path, content=body)
            return await http.post(path, json=body)

    return asyncio.run(go())


def lines_of(reply: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in reply.text.split("\n") if line]


def expected(prompt: str, num_tokens: int) -> str:
    """What the fake model answers."""
    tokenizer = ByteTokenizer()
    samples = [SampleInput(SamplingParams())] * num_tokens
    return tokenizer.decode(generate(tokenizer.encode(prompt), samples))


@pytest.mark.parametrize("path", ["/generate", "/generate/"])
def test_generate_has_the_seed_pages_shape(path: str) -> None:
    reply = post(path, {"prompt": "What is AI?", "n_predict": 64})
    assert reply.status_code == 200
    assert reply.json() == {
        "index": 0,
        "message": {"role": "assistant", "content": "a branch of computer science"},
        "finish_reason": "stop",
    }


def test_generate_stops_at_n_predict_and_says_length() -> None:
    reply = post("/generate/", {"prompt": "What is AI?", "n_predict": 8}).json()
    assert reply["message"]["content"] == "a branch"
    assert reply["finish_reason"] == "length"


def test_generate_predicts_32_tokens_by_default() -> None:
    reply = post("/generate/", {"prompt": "hello"}).json()
    assert reply["message"]["content"] == expected("hello", 32)


@pytest.mark.parametrize("path", ["/generate_stream", "/generate_stream/"])
def test_stream_has_the_seed_pages_lines(path: str) -> None:
    reply = post(path, {"prompt": "What is AI?", "n_predict": 3})
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.text == (
        '{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": null}\n'
        '{"index": 1, "message": {"role": "assistant", "content": " "}, "finish_reason": null}\n'
        '{"index": 2, "message": {"role": "assistant", "content": "b"}, "finish_reason": null}\n'
        '{"index": 3, "message": {"role": "assistant", "content": null}, '
        '"finish_reason": "length"}\n'
    )


def test_stream_says_stop_at_the_end_token() -> None:
    lines = lines_of(post("/generate_stream", {"prompt": "What is AI?", "n_predict": 99}))
    text = "a branch of computer science"
    assert "".join(line["message"]["content"] or "" for line in lines) == text
    assert [line["index"] for line in lines] == list(range(len(text) + 2))
    assert [line["finish_reason"] for line in lines] == [None] * (len(text) + 1) + ["stop"]
    assert lines[-1]["message"]["content"] is None


def test_emoji_split_over_tokens_are_never_broken() -> None:
    lines = lines_of(post("/generate_stream", {"prompt": "emoji", "n_predict": 5}))
    contents = [line["message"]["content"] for line in lines[:-1]]
    assert contents == ["a", "b", "", "", ""]
    lines = lines_of(post("/generate_stream", {"prompt": "emoji", "n_predict": 99}))
    text = "".join(line["message"]["content"] or "" for line in lines)
    assert text == "ab\N{GRINNING FACE}c\N{EARTH GLOBE EUROPE-AFRICA}"
    assert not any("\ufffd" in (line["message"]["content"] or "") for line in lines)


def test_a_line_break_in_the_text_does_not_break_a_line() -> None:
    reply = post("/generate_stream", {"prompt": "lines", "n_predict": 99})
    texts = [json.loads(line)["message"]["content"] or "" for line in reply.text.splitlines()]
    assert "".join(texts) == "one\ntwo\u2028three"


def test_options_reach_the_engine() -> None:
    body = {"prompt": "What is AI?", "n_predict": 99}
    assert post("/generate", body | {"stop": "computer"}).json() == {
        "index": 0,
        "message": {"role": "assistant", "content": "a branch of "},
        "finish_reason": "stop",
    }
    assert post("/generate", body | {"stop": "x" * 500}).status_code == 200
    assert post("/generate", body | {"stop": ["of", " com"]}).json()["message"]["content"] == (
        "a branch "
    )
    ignoring = post("/generate", body | {"n_predict": 40, "ignore_eos": True}).json()
    assert ignoring["finish_reason"] == "length"
    sampled = {"prompt": "hi", "temperature": 1.0, "top_p": 0.9, "top_k": 5}
    first, second = (post("/generate", sampled | {"seed": 7}).json() for _ in range(2))
    other = post("/generate", sampled | {"seed": 8}).json()
    assert first == second != other
    assert first["message"]["content"] != expected("hi", 32)


def test_prompt_longer_than_a_step_is_served_in_chunks() -> None:
    prompt = "x" * 300
    config = {"max_num_batched_tokens": 64}
    reply = post("/generate", {"prompt": prompt, "n_predict": 4}, config=config).json()
    assert reply["message"]["content"] == expected(prompt, 4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"", 400, None, "body"),
        (b"{", 400, None, "not JSON"),
        (b"hello", 400, None, "not JSON"),
        (b"\xff\xfe\xfd", 400, None, "JSON"),
        (b"[]", 400, None, "object"),
        (b'"text"', 400, None, "object"),
        (b"[" * 100_000, 400, None, "JSON"),
        (b'{"a":' * 100_000, 400, None, "JSON"),
        ({}, 400, "prompt", "is missing"),
        ({"prompt": None}, 400, "prompt", "string"),
        ({"prompt": 5}, 400, "prompt", "string"),
        ({"prompt": ["a"]}, 400, "prompt", "string"),
        ({"prompt": ""}, 400, "prompt", "at least 1 character"),
        ({"prompt": "a", "n_predict": 0}, 400, "n_predict", "1"),
        ({"prompt": "a", "n_predict": -1}, 400, "n_predict", "1"),
        ({"prompt": "a", "n_predict": "8"}, 400, "n_predict", "integer"),
        ({"prompt": "a", "n_predict": 8.5}, 400, "n_predict", "integer"),
        ({"prompt": "a", "n_predict": True}, 400, "n_predict", "integer"),
        ({"prompt": "a", "n_predict": 10**30}, 400, "n_predict", str(10**30)),
        (b'{"prompt": "a", "n_predict": 1' + b"0" * 5000 + b"}", 400, None, "JSON"),
        ({"prompt": "a", "n_predit": 8}, 400, "n_predit", "not a field"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "number"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "0"),
        ({"prompt": "a", "temperature": 10**400}, 400, "temperature", ""),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature", ""),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", ""),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "0"),
        ({"prompt": "a", "top_p": 1.5}, 400, "top_p", "1"),
        ({"prompt": "a", "top_k": -2}, 400, "top_k", "0"),
        ({"prompt": "a", "seed": 2**70}, 400, "seed", "less than"),
        ({"prompt": "a", "stop": ""}, 400, "stop", "at least 1"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "at least 1"),
        ({"prompt": "a", "stop": ["x"] * 100}, 400, "stop", "64"),
        ({"prompt": "a", "stop": 5}, 400, "stop", "string"),
        (b'{"prompt": "\\ud800"}', 400, "prompt", "surrogate"),
        (b'{"prompt": "a", "stop": "\\ud800"}', 400, "stop", "surrogate"),
        (b'{"prompt": "a", "\\ud800": 1}', 400, None, "surrogate"),
        (b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}', 400, "x" * 200, "not a field"),
    ],
)
def test_refusals_name_the_field(
    path: str, body: Any, status: int, param: str | None, words: str
) -> None:
    reply = post(path, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (status, "invalid_request_error")
    assert error["param"] is None if param is None else error["param"].startswith(param)
    assert words in error["message"]
    assert len(reply.content) < 20_000


@pytest.mark.parametrize("path", PATHS)
def test_too_long_is_refused_with_both_numbers(path: str) -> None:
    reply = post(path, {"prompt": "x" * 500, "n_predict": 13})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert "500" in error["message"] and "13" in error["message"]
    assert str(MAX_MODEL_LEN) in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert post(path, {"prompt": "x" * 500, "n_predict": 12}).status_code == 200


def test_odd_text_is_served() -> None:
    for prompt in ("\0", "a\0b", "\u202e\u0085\ufeff", "\U0010ffff", "\N{GRINNING FACE}" * 50):
        reply = post("/generate", {"prompt": prompt, "n_predict": 2})
        assert reply.status_code == 200, prompt
        assert reply.json()["message"]["content"] == expected(prompt, 2)


def test_a_megabyte_of_text_is_served_or_refused() -> None:
    prompt = "word " * 200_000
    assert post("/generate", {"prompt": prompt}).status_code == 400
    limits = {"max_model_len": 40_000, "num_blocks": 4096}
    served = post("/generate", {"prompt": prompt[:20_000], "n_predict": 1}, **limits)
    assert served.status_code == 200


def test_body_over_the_limit_is_413() -> None:
    config = {"max_body_size": 1000}
    reply = post("/generate", {"prompt": "x" * 1000}, config=config)
    assert reply.status_code == 413
    assert "1000 bytes" in reply.json()["error"]["message"]

    async def chunked() -> httpx.Response:
        async def pieces() -> Any:
            for _ in range(20):
                yield b"x" * 100

        async with client(config=config) as (http, _):
            return await http.post("/generate", content=pieces())

    assert asyncio.run(chunked()).status_code == 413


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_json_under_another_label_is_understood(kind: str | None) -> None:
    async def go() -> httpx.Response:
        async with client() as (http, _):
            headers = {"content-type": kind} if kind else {}
            return await http.post(
                "/generate", content=b'{"prompt": "emoji", "n_predict": 2}', headers=headers
            )

    assert asyncio.run(go()).json()["message"]["content"] == "ab"


def test_a_browser_must_label_json_as_json() -> None:
    """A page of another site may post text/plain without asking us first, but not JSON."""

    async def go() -> list[int]:
        async with client() as (http, _):
            replies = [
                await http.post(
                    "/generate",
                    content=b'{"prompt": "emoji", "n_predict": 2}',
                    headers={
                        "content-type": kind,
                        "origin": "http://elsewhere.example",
                        "host": "localhost",
                    },
                )
                for kind in ("text/plain", "application/json")
            ]
            return [reply.status_code for reply in replies]

    assert asyncio.run(go()) == [400, 200]


def test_unknown_routes_and_methods_answer_in_the_same_shape() -> None:
    async def go() -> list[httpx.Response]:
        async with client() as (http, _):
            return [
                await http.get("/nothing"),
                await http.get("/generate"),
                await http.get("/health/x"),
            ]

    for reply, status in zip(asyncio.run(go()), (404, 405, 404), strict=True):
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_full_queue_is_503_with_retry_after() -> None:
    async def go() -> list[httpx.Response]:
        config = {"max_num_seqs": 1, "max_queue_len": 2}
        async with client(delay=0.02, config=config) as (http, _):
            body = {"prompt": "x", "n_predict": 10}
            return await asyncio.gather(*(http.post("/generate", json=body) for _ in range(8)))

    replies = asyncio.run(go())
    refused = [reply for reply in replies if reply.status_code == 503]
    assert 1 <= len(refused) <= 6
    assert len(refused) + sum(reply.status_code == 200 for reply in replies) == 8
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"


def test_a_bug_answers_500_without_the_prompt() -> None:
    async def go() -> httpx.Response:
        async with client() as (http, service):

            def explode(request: Any) -> None:
                raise LookupError("secret prompt")

            service.engine.engine.submit = explode
            return await http.post("/generate", json={"prompt": "secret prompt"})

    reply = asyncio.run(go())
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"


def test_engine_failure_reaches_the_client_and_health() -> None:
    async def go() -> tuple[httpx.Response, ...]:
        async with client(fail_at_step=3) as (http, _):
            body = {"prompt": "What is AI?"}
            stream = await http.post("/generate_stream", json=body)
            after = await http.post("/generate", json=body)
            return stream, after, await http.get("/health")

    stream, after, health = asyncio.run(go())
    last = lines_of(stream)[-1]
    assert last["finish_reason"] == "error" and "rank 1 is gone" in last["error"]
    assert last["message"]["content"] is None
    assert [reply.status_code for reply in (after, health)] == [503, 503]
    assert "rank 1 is gone" in health.json()["error"]["message"]


def test_engine_failure_without_stream_is_a_500() -> None:
    reply = post("/generate", {"prompt": "What is AI?"}, fail_at_step=3)
    assert reply.status_code == 500
    assert "rank 1 is gone" in reply.json()["error"]["message"]


def test_health_and_version() -> None:
    async def go() -> tuple[httpx.Response, httpx.Response, Service]:
        async with client() as (http, service):
            return await http.get("/health"), await http.get("/version"), service

    health, version, _ = asyncio.run(go())
    assert health.status_code == 200 and health.json()["status"] == "ok"
    assert version.json()["version"]


def test_logprobs_come_where_asked_for_and_nowhere_else() -> None:
    """One object a token, as in chat completions; a stream brings each with its token."""
    body = {"prompt": "What is AI?", "n_predict": 8}
    asked = post("/generate", body | {"logprobs": 2}).json()
    plain = post("/generate", body).json()
    assert plain == {name: value for name, value in asked.items() if name != "logprobs"}
    tokens = list(b"a branch")
    context = list(b"What is AI?")
    assert len(asked["logprobs"]) == len(tokens)
    for token, found in zip(tokens, asked["logprobs"], strict=True):
        top = logprobs(context, token, 2).top
        assert found == {
            "token": chr(token),
            "logprob": logprob(context, token),
            "bytes": [token],
            "top_logprobs": [
                {"token": chr(one), "logprob": value, "bytes": [one]} for one, value in top
            ],
        }
        context.append(token)
    *lines, last = lines_of(post("/generate_stream", body | {"logprobs": 2}))
    assert [line["logprobs"] for line in lines] == [[one] for one in asked["logprobs"]]
    assert "logprobs" not in last
    GenerateReply.model_validate(asked)


def test_echo_brings_the_prompt_and_its_logprobs() -> None:
    body = {"prompt": "What is AI?", "n_predict": 2, "echo": True, "logprobs": 0}
    whole = post("/generate", body).json()
    assert whole["message"]["content"] == "What is AI?a "
    assert "".join(one["token"] for one in whole["logprobs"]) == "What is AI?a "
    values = [one["logprob"] for one in whole["logprobs"]]
    tokens = list(b"What is AI?a ")
    assert values == [None, *(logprob(tokens[:n], tokens[n]) for n in range(1, len(tokens)))]
    *lines, _ = lines_of(post("/generate_stream", body))
    assert [line["message"]["content"] for line in lines] == ["What is AI?a", " "]
    assert [one for line in lines for one in line["logprobs"]] == whole["logprobs"]
    GenerateReply.model_validate(whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("best_of", 2), ("use_beam_search", True), ("top_logprobs", 1), ("max_tokens", 9),
     ("max_completion_tokens", 9), ("logprobs", 21), ("logprobs", True)],
)  # fmt: skip
def test_what_a_native_reply_cannot_hold_is_refused_by_name(field: str, value: Any) -> None:
    for path in ("/generate/", "/generate_stream/"):
        reply = post(path, {"prompt": "x", field: value})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == field


def test_every_sampling_field_reaches_the_sampler() -> None:
    """Item by item, each with a value of its own."""
    given = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "frequency_penalty": 0.5,
        "presence_penalty": 0.25, "repetition_penalty": 1.5, "seed": 7, "stop": ["q"],
        "stop_token_ids": [5], "logprobs": 1, "logit_bias": {"6": 1.0}, "min_tokens": 2,
        "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    neutral = {"n": 1, "best_of": 1, "use_beam_search": False, "echo": False}

    async def go(path: str) -> SamplingParams:
        async with client() as (http, service):
            body = {"prompt": "x", "n_predict": 3} | given | neutral
            reply = await http.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return service.runner.samples[0].params

    for path in ("/generate/", "/generate_stream/"):
        params = asyncio.run(go(path))
        told = given | {"stop": ("q",), "stop_token_ids": (5,), "logit_bias": {6: 1.0}}
        assert {name: getattr(params, name) for name in told} == told
