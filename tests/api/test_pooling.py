"""/v1/embeddings, /v1/rerank and /v1/score over the fake runner, whose vectors tell what it read:
how many tokens, the last of them, and their sum.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import math
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from autotp_serving.api.pooling.rerank import QWEN3_HEAD, QWEN3_TAIL
from tests.api.service import MAX_MODEL_LEN, Service, client
from tests.fakes import FakeRunner

Test = Callable[[httpx.AsyncClient, Service], Awaitable[Any]]

EMBEDDER = {"architectures": ["Qwen3Model"], "hidden_size": 3}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
RECIPE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def run(test: Test, folder: Path, task: str, config: dict[str, Any], **files: Any) -> Any:
    """Run a test against a model of this config.json, served for this task."""
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    settings = {"task": task, "max_num_batched_tokens": 48, "max_num_seqs": 3, "max_queue_len": 4}

    async def main() -> Any:
        async with client(model_path=str(folder), config=settings) as (http, service):
            return await test(http, service)

    return asyncio.run(asyncio.wait_for(main(), 60))


def direction(*vector: float) -> Any:
    """The vector at length 1."""
    return pytest.approx([one / math.hypot(*vector) for one in vector], rel=1e-6)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_openai_client_embeds_as_it_does_elsewhere(
    tmp_path: Path, max_in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "max_in_flight", max_in_flight)

    async def test(http: httpx.AsyncClient, service: Service) -> None:
        known = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        reply = await known.embeddings.create(model=tmp_path.name, input="abc")  # in base64
        assert (reply.object, reply.model) == ("list", tmp_path.name)
        assert reply.data[0].embedding == direction(3, 99, 294)
        assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (3, 3)
        for form in ("float", "base64"):
            reply = await known.embeddings.create(
                model=tmp_path.name, input=[[1, 2], [4]], encoding_format=form, dimensions=2
            )
            vectors = [one.embedding for one in reply.data]
            if form == "base64":  # asked for by name, it is handed on as it is
                vectors = [array("f", base64.b64decode(one)).tolist() for one in vectors]
            assert vectors == [direction(2, 2), direction(1, 4)]
        # More than run and wait at once, and longer than a step.
        texts = ["x" * count for count in range(1, 100)]
        reply = await known.embeddings.create(
            model=tmp_path.name, input=texts, extra_body={"use_activation": False}
        )
        assert [one.embedding[0] for one in reply.data] == list(range(1, 100))
        assert [one.index for one in reply.data] == list(range(99))
        assert service.engine.engine.stats().num_finished["stop"] == 104
        latencies = service.engine.latencies
        for histogram in (latencies.request_queue_time, latencies.e2e_request_latency):
            assert sum(histogram.counts) == 104
        assert not any(latencies.request_decode_time.counts)

    run(test, tmp_path, "embed", EMBEDDER)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "must be text"),
        ({"input": [""]}, "input", "must not be empty"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": [300]}, "input", "token 300"),
        ({"input": "a" * (MAX_MODEL_LEN + 1)}, "input", "limit of 512"),
        ({"input": "a", "dimensions": 4}, "dimensions", "at most 3"),
        ({"input": "a", "dimensions": 1}, "dimensions", "one of 2, 3"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "prompt_name": "x"}, "prompt_name", "query"),
        ({"input": [1], "prompt_name": "query"}, "prompt_name", "token ids"),
        ({"input": "a", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens", "not supported"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "top_k": 2}, "top_k", "not a field"),
    ],
)
def test_what_an_embedding_cannot_be_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], param: str, words: str
) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> httpx.Response:
        return await http.post("/v1/embeddings", json=fields)

    prompts = {"prompts": {"query": "q: "}}
    config = EMBEDDER | {"matryoshka_dimensions": [2, 3]}
    reply = run(test, tmp_path, "embed", config, config_sentence_transformers=prompts)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


def test_prompts_and_the_end_token_are_the_checkpoints_own(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        async def embed(**fields: Any) -> list[float]:
            reply = await http.post("/embeddings", json={"normalize": False, **fields})
            assert reply.status_code == 200, reply.text
            return reply.json()["data"][0]["embedding"]

        end = ord("!")
        assert await embed(input="a") == [5, end, sum(b"q: a!")]
        assert await embed(input="a!") == [5, end, sum(b"q: a!")]
        assert await embed(input="a", prompt_name="none") == [2, end, sum(b"a!")]
        assert await embed(input=[97]) == [1, 97, 97]

    prompts = {"prompts": {"query": "q: ", "none": ""}, "default_prompt_name": "query"}
    run(
        test, tmp_path, "embed", EMBEDDER, config_sentence_transformers=prompts,
        tokenizer_config={"add_eos_token": True, "eos_token": "!"},
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "num_hits"), [("lasttoken", 96), ("mean", 0)])
def test_a_beginning_is_taken_from_the_cache_where_the_last_token_counts(
    tmp_path: Path, mode: str, num_hits: int
) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        fields = {"input": "x" * 100 + "y", "normalize": False}
        replies = [await http.post("/v1/embeddings", json=fields) for _ in range(2)]
        (first, second) = (reply.json()["data"][0]["embedding"] for reply in replies)
        assert first == second
        assert first[0] == pytest.approx(51 if mode == "mean" else 101)
        assert service.engine.engine.stats().num_prefix_hit_tokens == num_hits

    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    modules = [{"type": "x.Pooling", "path": "1_Pooling"}]
    run(test, tmp_path, "embed", EMBEDDER, modules=modules)


def test_a_prompt_whose_tokens_see_later_ones_is_not_cut(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        texts = ["x" * 48, "y" * 30, "z" * 30, "x" * 48]
        reply = await http.post("/v1/embeddings", json={"input": texts, "normalize": False})
        assert [one["embedding"][0] for one in reply.json()["data"]] == [48, 30, 30, 48]
        lens = [length for batch in service.runner.batches for length in batch.query_lens]
        assert lens == [48, 30, 30, 48]
        assert service.engine.engine.stats().num_prefix_hit_tokens == 0
        reply = await http.post("/v1/embeddings", json={"input": "x" * 49})
        assert reply.status_code == 400 and "--max-num-batched-tokens" in reply.text

    run(test, tmp_path, "embed", EMBEDDER | {"is_causal": False})


def test_a_client_that_leaves_lets_go_of_everything(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        service.runner.delay = 0.05
        call = asyncio.create_task(http.post("/v1/embeddings", json={"input": ["x" * 500] * 20}))
        while not service.engine.num_open:
            await asyncio.sleep(0.01)
        call.cancel()
        while service.engine.engine.has_work:
            await asyncio.sleep(0.01)
        stats = service.engine.engine.stats()
        assert (stats.num_held_blocks, stats.num_waiting) == (0, 0)
        assert stats.num_finished["abort"] > 0 and not service.runner.kept

    run(test, tmp_path, "embed", EMBEDDER)


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> httpx.Response:
        collect = service.runner.collect
        service.runner.collect = lambda: dataclasses.replace(collect(), pooled=[b""])
        return await http.post("/v1/embeddings", json={"input": "a"})

    reply = run(test, tmp_path, "embed", EMBEDDER)
    assert reply.status_code == 500 and "NaN" in reply.json()["error"]["message"]


def sigmoid(value: float) -> Any:
    return pytest.approx(1 / (1 + math.exp(-value)))


def test_documents_are_ranked_in_the_shape_of_cohere_and_jina(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        service.runner.vector_size = 1  # how many tokens there are, in place of a logit
        fields = {"query": "ab", "documents": ["x", {"text": "xyz", "id": 4}, "xy"]}
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            reply = (await http.post(path, json=fields)).json()
            assert reply["results"] == [
                {"index": 1, "relevance_score": 6.0, "document": {"text": "xyz"}},
                {"index": 2, "relevance_score": 5.0, "document": {"text": "xy"}},
                {"index": 0, "relevance_score": 4.0, "document": {"text": "x"}},
            ]
            assert reply["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
            assert reply["id"].startswith("rerank-") and reply["model"] == tmp_path.name
        asked = fields | {"top_n": 1, "return_documents": False}
        reply = (await http.post("/v1/rerank", json=asked)).json()
        assert reply["results"] == [{"index": 1, "relevance_score": 6.0}]
        for wrong, param in (
            ({"documents": []}, "documents"),
            ({"documents": ["a"] * 2049}, "documents"),
            ({"query": ""}, "query"),
            ({"max_tokens_per_doc": 5}, "max_tokens_per_doc"),
            ({"instruction": "be kind"}, "instruction"),
            ({"documents": ["a", "b" * 600]}, "documents"),
        ):
            refusal = await http.post("/v1/rerank", json=fields | wrong)
            assert refusal.status_code == 400, wrong
            assert refusal.json()["error"]["param"].startswith(param)

    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    run(test, tmp_path, "rerank", CLASSIFIER | {"sentence_transformers": identity})


def test_pairs_are_scored_in_the_shape_of_vllm(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        service.runner.vector_size = 1

        async def score(**fields: Any) -> list[Any]:
            reply = (await http.post("/score", json=fields)).json()
            assert reply["object"] == "list" and reply["id"].startswith("score-")
            assert [(one["index"], one["object"]) for one in reply["data"]] == [
                (index, "score") for index in range(len(reply["data"]))
            ]
            return [one["score"] for one in reply["data"]]

        # Both texts and the token that the fake tokenizer puts between them.
        assert await score(text_1="a", text_2="b") == [sigmoid(3)]
        assert await score(text_1="a", text_2=["b", "bcd"]) == [sigmoid(3), sigmoid(5)]
        assert await score(text_1=["a", "ab"], text_2=["b", "bc"]) == [sigmoid(3), sigmoid(5)]
        for names in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
            assert await score(**dict(zip(names, ("a", "b"), strict=True))) == [sigmoid(3)]
        assert await score(text_1="a", text_2="b", use_activation=False) == [3.0]
        twice = {"text_1": "a", "queries": "a", "text_2": "b"}
        reply = await http.post("/v1/score", json=twice)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "queries"
        reply = await http.post("/v1/score", json={"text_1": ["a", "b"], "text_2": ["c"]})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "text_1"

    run(test, tmp_path, "rerank", CLASSIFIER)


def test_qwen3_reranker_reads_the_words_that_its_makers_have_published(tmp_path: Path) -> None:
    read: list[str] = []

    async def test(http: httpx.AsyncClient, service: Service) -> None:
        service.runner.vector_size = 2
        for more in ({}, {"instruction": "Judge."}):
            fields = {"query": "a {q}", "documents": ["d"], **more}
            reply = await http.post("/v1/rerank", json=fields)
            assert reply.status_code == 200, reply.text
            # The answers' logits are the fake's first two numbers: tokens, and the last of them.
            num_tokens, last = reply.json()["usage"]["prompt_tokens"], ord("\n")
            score = reply.json()["results"][0]["relevance_score"]
            assert score == sigmoid(last - num_tokens)
        tokens = [token for batch in service.runner.batches for token in batch.token_ids]
        read.append(bytes(tokens).decode())

    words = {"model": {"vocab": {"no": 5, "yes": 7}}}
    run(test, tmp_path, "rerank", RECIPE, tokenizer=words)
    body = "<Query>: a {q}\n<Document>: d"
    web = "Given a web search query, retrieve relevant passages that answer the query"
    assert f"{QWEN3_HEAD}<Instruct>: {web}\n{body}{QWEN3_TAIL}" in read[0]
    # The second time, what both begin with is in the cache.
    assert read[0].endswith(f": Judge.\n{body}{QWEN3_TAIL}")


@pytest.mark.parametrize(
    ("task", "config", "paths"),
    [
        ("embed", EMBEDDER, ("/v1/completions", "/v1/chat/completions", "/generate/", "/score")),
        ("rerank", CLASSIFIER, ("/v1/responses", "/generate_stream/", "/v1/embeddings")),
        ("generate", {}, ("/v1/embeddings", "/v1/rerank", "/v2/rerank", "/v1/score")),
    ],
)
def test_routes_of_another_task_are_refused_by_name(
    tmp_path: Path, task: str, config: dict[str, Any], paths: tuple[str, ...]
) -> None:
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        for path in paths:
            reply = await http.post(path, json={})
            assert reply.status_code == 400, path
            assert reply.json()["error"]["code"] == "wrong_task"
            assert f"--task {task}" in reply.json()["error"]["message"]
        reply = await http.post("/v1/messages", json={"messages": []})
        assert reply.status_code == 400 and reply.json()["type"] == "error"
        assert (await http.get("/v1/models")).json()["data"][0]["task"] == task
        assert (await http.get("/health")).json()["task"] == task
        assert (await http.get("/ready")).status_code == 200

    run(test, tmp_path, task, config)
