"""gpt-oss in 16 bits and in MXFP4, at one to three ranks: the tokens of transformers itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.model.families import generate_with_transformers
from tests.model.gpt_oss import save_gpt_oss, save_mxfp4
from tests.model.test_quantized import save
from tests.ranks.test_families import IS_TRANSFORMERS_4, SETTINGS, run_jobs

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(IS_TRANSFORMERS_4, reason="keeps its experts in another way"),
]

MAX_TOKENS = 10

# Checkpoint and --low-bit. What is exact is compared with transformers, the others with one rank.
EXACT = (("dense", "bf16"), ("mxfp4", "bf16"), ("mxfp4", None), ("saved", None))
ROUNDED = (("dense", "sym_int4"), ("dense", "fp6"), ("mxfp4", "fp4"), ("mxfp4", "sym_int4"))
ROUNDED += (("saved-sym_int4", None),)


def make_prompts() -> list[list[int]]:
    """A token, less than a window, a chunk and more; and what YaRN stretches to four times over."""
    rng = random.Random(5)
    return [[rng.randrange(3, 258) for _ in range(length)] for length in (1, 17, 65, 300)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpt_oss")
    quantized = save_mxfp4(root)
    dense = save_gpt_oss(root / "dense")
    save(quantized.folder, root / "saved")
    save(dense, root / "saved-sym_int4", low_bit="sym_int4")
    return {
        "dense": dense,
        "mxfp4": quantized.folder,
        "reference": quantized.reference,
        "saved": root / "saved",
        "saved-sym_int4": root / "saved-sym_int4",
    }


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str | None, int], Any]:
    settings = SETTINGS | {"max_model_len": 384}
    found = {}
    for num_ranks in (1, 2, 3):
        kinds = EXACT if num_ranks == 2 else EXACT + ROUNDED
        jobs = [
            {"model": str(folders[name]), "prompts": make_prompts(), "max_tokens": MAX_TOKENS}
            | {"settings": settings | {"low_bit": low_bit}}
            for name, low_bit in kinds
        ]
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {(*kind, num_ranks): one for kind, one in zip(kinds, results, strict=True)}
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Of the checkpoint in 16 bits, and of the numbers that MXFP4 means, in float32."""
    found = {
        name: generate_with_transformers(folders[name], make_prompts(), MAX_TOKENS)
        for name in ("dense", "reference")
    }
    for tokens in found.values():
        assert len({token for answer in tokens for token in answer}) > 12, "proves little"
    return found | {"mxfp4": found["reference"], "saved": found["reference"]}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_tokens_equal_those_of_transformers(
    kind: tuple[str, str | None], num_ranks: int, answers: dict, expected: dict
) -> None:
    assert answers[(*kind, num_ranks)] == expected[kind[0]]


@pytest.mark.parametrize("kind", ROUNDED, ids=str)
def test_low_bit_tokens_are_those_of_one_rank(kind: tuple[str, str | None], answers: dict) -> None:
    assert isinstance(answers[(*kind, 1)], list), answers[(*kind, 1)]
    assert answers[(*kind, 3)] == answers[(*kind, 1)]


def test_saved_low_bit_is_what_was_converted_at_start(answers: dict) -> None:
    assert answers["saved-sym_int4", None, 1] == answers["dense", "sym_int4", 1]
