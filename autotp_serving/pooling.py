"""How an embedding or reranking checkpoint is to be read: its pooling, prompts and classifier.

Every rank; no torch. Written in the files of sentence-transformers (`modules.json` and what it
names), and in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.model_folder import MAX_LARGE_BYTES, find_file, read_object
from autotp_serving.request import PoolingMethod

MODULES_NAME = "modules.json"
SETTINGS_NAME = "config_sentence_transformers.json"
POOLING_FOLDER = "1_Pooling"
SCORE_FOLDER = "1_LogitScore"

METHODS: dict[str, PoolingMethod] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
}
"""Ours, by the names that sentence-transformers has written."""

QWEN3_RERANKER_TOKENS = ("no", "yes")
CLASSIFIER_SUFFIX = "ForSequenceClassification"
ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": False,
    "torch.nn.modules.activation.Sigmoid": True,
}
"""Whether scores go through a sigmoid."""

MAX_MODULES_BYTES = 2**20


@dataclass(frozen=True)
class PoolingSettings:
    """How prompts become vectors, or scores.

    Attributes:
        method: which hidden states after the last norm are taken.
        normalize: embeddings have length 1.
        prompts: texts that may be put before an input, by name.
        default_prompt: name of the one that is, where a request names none.
        dimensions: what embeddings may be cut to; () for any number.
        labels: rows of a stored classifier; 0 without one.
        label_tokens: tokens whose rows of the output head are the classifier, the false one first.
        sigmoid: scores are from 0 to 1.
        is_causal: tokens see those before them only; else prompts cannot run in chunks.
        size: numbers of a hidden state, which an embedding is unless it is cut.
        end_text: the end token, if each text is to end with it, even where tokenizer.json puts
            none there; else "".
    """

    method: PoolingMethod = "last"
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    dimensions: tuple[int, ...] = ()
    labels: int = 0
    label_tokens: tuple[int, ...] = ()
    sigmoid: bool = True
    is_causal: bool = True
    size: int = 0
    end_text: str = ""


def find_task(folder: Path) -> str:
    """What `--task auto` is for a folder: what its own files say it was made for."""
    try:
        architectures = _read_architectures(read_object(find_file(folder, "config.json")))
        modules = _list_modules(folder)
    except ConfigError:  # whoever loads it says what is wrong
        return "generate"
    if any(kind == "Pooling" for kind, _ in modules):
        return "embed"
    is_reranker = any(kind == "LogitScore" for kind, _ in modules)
    if is_reranker or any(name.endswith(CLASSIFIER_SUFFIX) for name in architectures):
        return "rerank"
    generators = ("LMHeadModel", "ChatGLMModel")
    if architectures and all(
        name.endswith("Model") and not name.endswith(generators) for name in architectures
    ):
        return "embed"
    return "generate"


def read_pooling(config: ServingConfig) -> PoolingSettings | None:
    """How the model of these settings pools; None where it generates.

    Raises:
        ConfigError: a checkpoint for something else, or that asks for what is not done here.
    """
    if not config.pools:
        return None
    folder = Path(config.model_path)
    found = read_object(folder / "config.json")
    if config.task == "rerank":
        return _read_reranker(folder, found)
    return _read_embedder(folder, found)


def _read_embedder(folder: Path, found: dict[str, Any]) -> PoolingSettings:
    if any(name.endswith(CLASSIFIER_SUFFIX) for name in _read_architectures(found)):
        raise ConfigError("--task embed: this checkpoint has a classifier; --task rerank serves it")
    method: PoolingMethod = "last"
    normalize, includes_prompt = True, True
    modules = _list_modules(folder)
    if modules:
        normalize = any(kind == "Normalize" for kind, _ in modules)
    for kind, path in modules:
        if kind == "Pooling":
            method, includes_prompt = _read_method(folder, f"{path}/config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise ConfigError(
                f"{folder / MODULES_NAME} has a module {kind} after the model, which is not done "
                "here: this checkpoint cannot be served"
            )
    settings = _read_if_there(folder / SETTINGS_NAME)
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    is_valid = isinstance(prompts, dict) and all(isinstance(one, str) for one in prompts.values())
    if not is_valid or not (default is None or default in prompts):
        raise ConfigError(f"{folder / SETTINGS_NAME}: its prompts are no texts by name")
    if method == "mean" and not includes_prompt and any(prompts.values()):
        raise ConfigError(
            f"{folder / POOLING_FOLDER}: include_prompt is false, and to leave prompts out of a "
            "mean is not done here: this checkpoint cannot be served"
        )
    dimensions = found.get("matryoshka_dimensions") or []
    if not isinstance(dimensions, list) or any(type(one) is not int for one in dimensions):
        raise ConfigError(f"{folder / 'config.json'}: matryoshka_dimensions must be numbers")
    return PoolingSettings(
        method,
        normalize,
        {name: text for name, text in prompts.items() if isinstance(name, str)},
        default,
        tuple(dimensions),
        is_causal=_read_causality(found),
        size=_read_size(folder, found),
        end_text=_read_end_text(folder),
    )


def _read_causality(found: dict[str, Any]) -> bool:
    """Whether attention has a causal mask, as transformers reads it from config.json."""
    return (
        found.get("is_causal") is not False and found.get("use_bidirectional_attention") is not True
    )


def _read_size(folder: Path, found: dict[str, Any]) -> int:
    """The hidden size, of a text model or of the text part of another."""
    inner = found.get("text_config")
    size = found.get("hidden_size") or (inner.get("hidden_size") if isinstance(inner, dict) else 0)
    if type(size) is not int or size < 1:
        raise ConfigError(f"--task embed: {folder / 'config.json'} names no hidden_size")
    return size


def _read_end_text(folder: Path) -> str:
    found = _read_if_there(folder / "tokenizer_config.json")
    if found.get("add_eos_token") is not True:
        return ""
    token = found.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _read_reranker(folder: Path, found: dict[str, Any]) -> PoolingSettings:
    architectures = _read_architectures(found)
    if any(name.endswith(CLASSIFIER_SUFFIX) for name in architectures):
        labels = found.get("num_labels") or len(found.get("id2label") or (0, 1))
        if labels != 1:
            raise ConfigError(
                f"--task rerank: the classifier of this checkpoint has {labels} labels, and a "
                "reranker has one"
            )
        return PoolingSettings(
            normalize=False,
            labels=1,
            sigmoid=_read_sigmoid(folder, found),
            is_causal=_read_causality(found),
        )
    is_qwen3 = found.get("model_type") == "qwen3" and "Qwen3ForCausalLM" in architectures
    tokens = _find_label_tokens(folder) if is_qwen3 else ()
    paths = [path for kind, path in _list_modules(folder) if kind == "LogitScore"]
    for path in paths:
        score = read_object(find_file(folder, f"{path}/config.json", MODULES_NAME))
        if (score.get("false_token_id"), score.get("true_token_id")) != tokens:
            tokens = ()
    if not tokens:
        raise ConfigError(
            "--task rerank: served are checkpoints of a class ...ForSequenceClassification with "
            "one label, and Qwen3-Reranker, whose answers are the tokens 'yes' and 'no'; this one "
            f"is {', '.join(architectures) or 'of no class that config.json names'}"
        )
    return PoolingSettings(normalize=False, label_tokens=tokens)


def _find_label_tokens(folder: Path) -> tuple[int, ...]:
    """The ids of Qwen3-Reranker's answers, no and yes; () where the tokenizer lacks one."""
    path = folder / "tokenizer.json"
    model = read_object(path, MAX_LARGE_BYTES).get("model") if path.exists() else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return ()
    found = [vocabulary.get(word) for word in QWEN3_RERANKER_TOKENS]
    tokens = tuple(one for one in found if type(one) is int and one >= 0)
    return tokens if len(tokens) == len(QWEN3_RERANKER_TOKENS) else ()


def _read_sigmoid(folder: Path, found: dict[str, Any]) -> bool:
    """Whether the scores of a classifier with one label go through a sigmoid: so by default."""
    inner = found.get("sentence_transformers")
    names = (
        inner.get("activation_fn") if isinstance(inner, dict) else None,
        found.get("sbert_ce_default_activation_function"),
        _read_if_there(folder / SETTINGS_NAME).get("activation_fn"),
    )
    name = next((name for name in names if name is not None), None)
    if name is None:
        return True
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"--task rerank: this checkpoint puts its scores through {name!r:.80}; done here are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _read_method(folder: Path, name: str) -> tuple[PoolingMethod, bool]:
    """The pooling method of a file of sentence-transformers, and whether it takes prompts in."""
    found = read_object(find_file(folder, name, MODULES_NAME))
    given = found.get("pooling_mode")
    chosen = [
        mode for mode, is_on in found.items() if mode[:13] == "pooling_mode_" and is_on is True
    ]
    if given is not None:
        chosen = given if isinstance(given, list) else [given]
    methods = [METHODS.get(mode) for mode in chosen if isinstance(mode, str)]
    if len(methods) != 1 or methods[0] is None:
        raise ConfigError(
            f"{folder / name} asks for pooling by {', '.join(map(str, chosen)) or 'nothing'}; done "
            "here are one of last token, mean and first token (cls)"
        )
    return methods[0], found.get("include_prompt") is not False


def _list_modules(folder: Path) -> list[tuple[str, str]]:
    """What modules.json names: the last part of each type, and its folder; [] without the file."""
    path = folder / MODULES_NAME
    if not path.exists():
        return []
    try:
        with find_file(folder, MODULES_NAME).open("rb") as file:
            entries = json.loads(file.read(MAX_MODULES_BYTES))
        return [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no list of modules as sentence-transformers writes it "
            f"({type(error).__name__}): download it again"
        ) from error


def _read_architectures(found: dict[str, Any]) -> list[str]:
    names = found.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
