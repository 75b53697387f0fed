"""What the files of an embedding or reranking checkpoint say, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.pooling import PoolingSettings, find_task, read_pooling

EMBEDDER = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 8}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
ST = "sentence_transformers.models."


def write(folder: Path, files: dict[str, Any]) -> Path:
    """A folder of JSON files; modules are given as (type, folder) pairs."""
    for name, content in files.items():
        if name == "modules.json":
            content = [{"type": kind, "path": path} for kind, path in content]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def with_pooling(mode: Any, *more: tuple[str, str]) -> dict[str, Any]:
    """The files of an embedding model that pools so."""
    modules = [(f"{ST}Transformer", ""), (f"{ST}Pooling", "1_Pooling"), *more]
    config = mode if isinstance(mode, dict) else {"pooling_mode": mode}
    return {"config.json": EMBEDDER, "modules.json": modules, "1_Pooling/config.json": config}


def read(folder: Path, task: str) -> PoolingSettings | None:
    return read_pooling(ServingConfig(model_path=str(folder), task=task))


OLD = {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True, "include_prompt": True}
NORMALIZE = (f"{ST}Normalize", "2_Normalize")
PROMPTS = {"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": EMBEDDER}, PoolingSettings(size=8)),
        (with_pooling(OLD, NORMALIZE), PoolingSettings(size=8)),
        (with_pooling("mean"), PoolingSettings("mean", normalize=False, size=8)),
        (with_pooling(["cls"], NORMALIZE), PoolingSettings("cls", size=8)),
        (
            {"config.json": EMBEDDER | {"is_causal": False}},
            PoolingSettings(is_causal=False, size=8),
        ),
        (
            with_pooling(OLD, NORMALIZE) | {"config_sentence_transformers.json": PROMPTS},
            PoolingSettings(prompts=PROMPTS["prompts"], default_prompt="query", size=8),
        ),
        (
            {
                "config.json": EMBEDDER | {"matryoshka_dimensions": [4, 8]},
                "tokenizer_config.json": {"add_eos_token": True, "eos_token": {"content": "</s>"}},
            },
            PoolingSettings(dimensions=(4, 8), size=8, end_text="</s>"),
        ),
    ],
)
def test_embedding_models(tmp_path: Path, files: dict[str, Any], expected: PoolingSettings) -> None:
    assert read(write(tmp_path, files), "embed") == expected


WORDS = {"model": {"vocab": {"no": 5, "yes": 7}}}
SCORE = [(f"{ST}Transformer", ""), ("sentence_transformers.x.LogitScore", "1_LogitScore")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": CLASSIFIER}, PoolingSettings(normalize=False, labels=1)),
        (
            {
                "config.json": CLASSIFIER
                | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
            },
            PoolingSettings(normalize=False, labels=1, sigmoid=False),
        ),
        (
            {"config.json": EMBEDDER, "tokenizer.json": WORDS},
            PoolingSettings(normalize=False, label_tokens=(5, 7)),
        ),
        (
            {
                "config.json": EMBEDDER,
                "tokenizer.json": WORDS,
                "modules.json": SCORE,
                "1_LogitScore/config.json": {"true_token_id": 7, "false_token_id": 5},
            },
            PoolingSettings(normalize=False, label_tokens=(5, 7)),
        ),
    ],
)
def test_reranking_models(tmp_path: Path, files: dict[str, Any], expected: PoolingSettings) -> None:
    assert read(write(tmp_path, files), "rerank") == expected


@pytest.mark.parametrize(
    ("task", "files", "words"),
    [
        ("embed", with_pooling("max"), "pooling by max"),
        ("embed", with_pooling(["mean", "cls"]), "pooling by mean, cls"),
        ("embed", with_pooling("mean", (f"{ST}Dense", "2_Dense")), "a module Dense"),
        ("embed", {"config.json": CLASSIFIER}, "--task rerank serves it"),
        ("embed", {"config.json": EMBEDDER, "modules.json": [("a", "b")] * 40_000}, "no list of"),
        ("embed", with_pooling("mean") | {"modules.json": [("x.Pooling", "../out")]}, "leads out"),
        (
            "embed",
            with_pooling({"pooling_mode": "mean", "include_prompt": False})
            | {"config_sentence_transformers.json": PROMPTS},
            "include_prompt is false",
        ),
        ("rerank", {"config.json": CLASSIFIER | {"num_labels": 3}}, "3 labels"),
        ("rerank", {"config.json": EMBEDDER}, "Qwen3-Reranker"),
        (
            "rerank",
            {"config.json": CLASSIFIER | {"sbert_ce_default_activation_function": "os.system"}},
            "'os.system'",
        ),
        (
            "rerank",
            {
                "config.json": EMBEDDER,
                "tokenizer.json": WORDS,
                "modules.json": SCORE,
                "1_LogitScore/config.json": {"true_token_id": 6, "false_token_id": None},
            },
            "Qwen3-Reranker",
        ),
    ],
)
def test_what_is_not_done_is_refused(
    tmp_path: Path, task: str, files: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(write(tmp_path, files), task)


@pytest.mark.parametrize(
    ("files", "task"),
    [
        ({"config.json": EMBEDDER}, "generate"),
        (with_pooling(OLD), "embed"),
        ({"config.json": {"architectures": ["MistralModel"]}}, "embed"),
        ({"config.json": {"architectures": ["GPT2LMHeadModel"]}}, "generate"),
        ({"config.json": CLASSIFIER}, "rerank"),
        ({"config.json": EMBEDDER, "modules.json": SCORE}, "rerank"),
        ({"config.json": EMBEDDER, "modules.json": [("x", "y")] * 40_000}, "generate"),
        ({}, "generate"),
    ],
)
def test_the_task_is_what_the_files_say(tmp_path: Path, files: dict[str, Any], task: str) -> None:
    assert find_task(write(tmp_path, files)) == task


def test_a_model_that_generates_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, "generate") is None
