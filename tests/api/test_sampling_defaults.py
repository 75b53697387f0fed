"""What the makers of a model want its texts sampled by, where a request does not say."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.engine.sampling_defaults import SamplingDefaults, read_sampling_defaults
from autotp_serving.request import SamplingParams
from tests.api.service import client

LLAMA_2 = {
    "_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": 2,
    "max_length": 4096, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9,
    "transformers_version": "4.32.0.dev0",
}  # fmt: skip
QWEN = {
    "do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    "min_p": 0.05,
}  # fmt: skip
OPENAI = {
    "/v1/completions": {"prompt": "What is AI?", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}
NATIVE = {path: {"prompt": "hi", "n_predict": 2} for path in ("/generate/", "/generate_stream/")}


def write(folder: Path, **settings: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def find_params(folder: Path, path: str, body: dict[str, Any], **config: Any) -> SamplingParams:
    """What the engine is asked for, with a model folder that holds nothing but defaults."""

    async def go() -> SamplingParams:
        async with client(model_path=str(folder), config=config) as (http, service):
            submitted = []
            submit = service.engine.engine.submit

            def record(request: Any) -> Any:
                submitted.append(request.params)
                return submit(request)

            service.engine.engine.submit = record
            reply = await http.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return submitted[0]

    return asyncio.run(go())


@pytest.mark.parametrize("path", OPENAI)
def test_what_a_request_leaves_out_is_the_model_s(path: str, tmp_path: Path) -> None:
    write(tmp_path, **QWEN)
    found = find_params(tmp_path, path, OPENAI[path])
    assert {name: getattr(found, name) for name in QWEN if name != "do_sample"} == {
        name: value for name, value in QWEN.items() if name != "do_sample"
    }
    given = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    found = find_params(tmp_path, path, OPENAI[path] | given)
    assert found == SamplingParams(max_tokens=2)
    found = find_params(tmp_path, path, OPENAI[path], generation_config="none")
    assert found == SamplingParams(max_tokens=2, temperature=1.0)


@pytest.mark.parametrize("path", NATIVE)
def test_the_native_routes_stay_greedy(path: str, tmp_path: Path) -> None:
    write(tmp_path, **QWEN)
    assert find_params(tmp_path, path, NATIVE[path]) == SamplingParams(max_tokens=2)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("auto", SamplingDefaults(0.6, 0.9)), ("none", SamplingDefaults())],
)
def test_the_defaults_in_force_are_told(
    source: str, expected: SamplingDefaults, tmp_path: Path
) -> None:
    write(tmp_path, **LLAMA_2)

    async def go() -> Any:
        config = {"generation_config": source}
        async with client(model_path=str(tmp_path), config=config) as (http, _):
            return (await http.get("/v1/models")).json()

    (card,) = asyncio.run(go())["data"]
    assert card["sampling_defaults"] == vars(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.7"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": [1.1]}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 3}, "asks for no_repeat_ngram_size"),
        ({"num_beams": 4, "typical_p": 0.9}, "asks for typical_p, num_beams"),
        ({"bad_words_ids": [[1]]}, "asks for bad_words_ids"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_named_at_start(
    settings: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, **{"top_p": 0.9, **settings})
    with caplog.at_level(logging.WARNING, "autotp_serving"):
        found = read_sampling_defaults(folder, "auto")
    assert found == SamplingDefaults(top_p=1.0 if "top_p" in settings else 0.9)
    (line,) = caplog.messages
    assert words in line and "\n" not in line


def test_values_that_ask_for_nothing_are_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(
        tmp_path, temperature=None, top_k=-1, num_beams=1, typical_p=1.0, no_repeat_ngram_size=0,
        bad_words_ids=None, suppress_tokens=[], do_sample=False, max_new_tokens=100,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "autotp_serving"):
        assert read_sampling_defaults(folder, "auto") == SamplingDefaults()
    assert not caplog.messages
    assert read_sampling_defaults(tmp_path / "nowhere", "auto") == SamplingDefaults()
