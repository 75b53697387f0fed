"""Every family that the server claims, at one and two ranks: the tokens of transformers itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.model.families import FAMILIES, generate_with_transformers, save_family
from tests.ranks.launch import run_jobs

pytestmark = pytest.mark.ranks

MAX_TOKENS = 12

# Transformers 4 chooses this family's attention from a table of its own: refused by name there.
REFUSED_BY_TRANSFORMERS_4 = ("qwen2-moe",)
IS_TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5

# Float32, so that no rounding excuses a difference; chunks of 48 tokens, and more prompts than run
# at once.
SETTINGS = {
    "dtype": "float32",
    "max_num_batched_tokens": 48,
    "max_num_seqs": 3,
    "max_model_len": 192,
    "kv_cache_memory": 32 * 2**20,
}


def make_prompts() -> list[list[int]]:
    """Prompts of one token, of less than a sliding window, a chunk, and more than either."""
    rng = random.Random(3)
    # The byte tokenizer knows fewer tokens than the models; no request may have the others.
    return [[rng.randrange(3, 258) for _ in range(length)] for length in (1, 2, 17, 40, 65, 130)]


@pytest.fixture(scope="module")
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of the families that this run asks for: with `-k mistral` only that one's."""
    mine = (item for item in request.session.items if item.module is request.module)
    chosen = {item.callspec.params["name"] for item in mine}
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name) for name in FAMILIES if name in chosen}


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], list[list[int]] | str]:
    """The server's answers by family, weight format and number of ranks."""
    kinds = [(name, low_bit) for low_bit in ("bf16", "sym_int8") for name in folders]
    jobs = [
        {
            "model": str(folders[name]),
            "prompts": make_prompts()[:: 1 if low_bit == "bf16" else 3],
            "max_tokens": MAX_TOKENS,
            "settings": SETTINGS | {"low_bit": low_bit},
        }
        for name, low_bit in kinds
    ]
    found = {}
    for num_ranks in (1, 2):
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {(*kind, num_ranks): one for kind, one in zip(kinds, results, strict=True)}
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_those_of_transformers(
    name: str, folders: dict[str, Path], answers: dict[tuple[str, str, int], Any]
) -> None:
    if IS_TRANSFORMERS_4 and name in REFUSED_BY_TRANSFORMERS_4:
        for num_ranks in (1, 2):
            assert "cannot be served with this version" in answers[name, "bf16", num_ranks]
        return
    expected = generate_with_transformers(folders[name], make_prompts(), MAX_TOKENS)
    assert len({token for answer in expected for token in answer}) > 12, "answers that prove little"
    assert answers[name, "bf16", 1] == expected
    assert answers[name, "bf16", 2] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_low_bit_tokens_are_those_of_one_rank(
    name: str, answers: dict[tuple[str, str, int], Any]
) -> None:
    whole = answers[name, "sym_int8", 1]
    is_refused = IS_TRANSFORMERS_4 and name in REFUSED_BY_TRANSFORMERS_4
    assert isinstance(whole, str if is_refused else list), whole
    assert answers[name, "sym_int8", 2] == whole
