"""Embeddings and scores at one, two and three ranks: transformers' own hidden states and logits.

Checkpoints as their makers leave them: without an output head and without the prefix `model.`, with
a classifier, or whole with the answers yes and no (Qwen3-Reranker).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.families import save_family
from tests.ranks.test_families import IS_TRANSFORMERS_4, SETTINGS, make_prompts, run_jobs

pytestmark = pytest.mark.ranks

NO, YES = 300, 301
HEADS = {"num_key_value_heads": 4}

WHOLE = {"max_num_batched_tokens": 140}
EXACT = {"low_bit": "bf16"}

# Family, its class in transformers (AutoModel...), the task, the pooling, settings.
CASES = {
    "last": ("qwen3", "", "embed", {"method": "last", "normalize": True}, EXACT),
    "mean": ("mistral", "", "embed", {"method": "mean", "dimensions": 48}, EXACT),
    "softcap": ("gemma2", "ForCausalLM", "embed", {"method": "mean"}, EXACT),
    "classifier": ("llama-tied-bias", "ForSequenceClassification", "rerank", {}, EXACT),
    "answers": ("qwen3", "ForCausalLM", "rerank", {}, EXACT),
    "tied-answers": ("qwen3", "ForCausalLM", "rerank", {}, EXACT),
    "both-ways": ("qwen2", "", "embed", {"method": "last", "whole": True}, EXACT | WHOLE),
    "both-ways-bfloat16": (
        "qwen2",
        "",
        "embed",
        {"method": "last", "normalize": True, "whole": True},
        EXACT | WHOLE | {"dtype": "bfloat16"},
    ),
    "low-bit": (
        "qwen3",
        "",
        "embed",
        {"method": "last", "normalize": True},
        {"low_bit": "sym_int8"},
    ),
}


def save(name: str, folder: Path) -> Path:
    """A random checkpoint of a case, in float32."""
    family, class_name, *_ = CASES[name]
    ties = {"tie_word_embeddings": name == "tied-answers" or family == "llama-tied-bias"}
    ties = {} if family == "gemma2" else ties
    if name.startswith("both-ways"):
        ties["is_causal"] = False
    save_family(family, folder, **HEADS, **ties, num_labels=1)
    if class_name == "ForCausalLM":
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"] |= {"no": NO, "yes": YES}
        path.write_text(json.dumps(tokenizer))
        return folder
    torch.manual_seed(5)
    model = getattr(transformers, f"AutoModel{class_name}").from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def compute(name: str, folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers' own model gives, a prompt at a time."""
    _, class_name, task, pooling, _ = CASES[name]
    kind = f"AutoModel{class_name}" if task == "rerank" else "AutoModel"
    model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").float()
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model(torch.tensor([prompt]))
        if class_name == "ForCausalLM" and task == "rerank":
            found.append(output.logits[0, -1, [NO, YES]])
            continue
        if task == "rerank":
            found.append(output.logits[0])
            continue
        hidden = output.last_hidden_state[0]
        vector = {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[pooling["method"]]
        vector = vector[: pooling.get("dimensions")]
        found.append(vector / vector.norm() if pooling.get("normalize") else vector)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pooling")
    return {name: save(name, root / name) for name in CASES}


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Any]:
    """The vectors of each case by number of ranks; every prompt twice, to meet the prefix cache."""
    jobs = [
        {
            "model": str(folders[name]),
            "prompts": make_prompts() * 2,
            "pooling": pooling,
            "settings": SETTINGS | settings | {"task": task},
        }
        for name, (_, _, task, pooling, settings) in CASES.items()
    ]
    found = {}
    for num_ranks in (1, 2, 3):
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {(name, num_ranks): one for name, one in zip(CASES, results, strict=True)}
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_vectors_equal_those_of_transformers(
    name: str, num_ranks: int, folders: dict[str, Path], answers: dict[tuple[str, int], Any]
) -> None:
    if IS_TRANSFORMERS_4 and "whole" in CASES[name][3]:
        pytest.skip("transformers 4 masks whatever config.json says")
    found = answers[name, num_ranks]
    assert isinstance(found, list), found
    expected = compute(name, folders[name], make_prompts())
    is_rounded = CASES[name][4] not in (EXACT, EXACT | WHOLE)
    for vector, again, known in zip(found[:6], found[6:], expected, strict=True):
        for one in (vector, again):
            if is_rounded:
                assert torch.tensor(one) @ known > 0.99
            else:
                torch.testing.assert_close(torch.tensor(one), known, atol=1e-4, rtol=1e-4)
