"""What the sweep over all families shows, on a few: equal to transformers or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.family_sweep import make_somehow, serve_all
from tests.ranks.launch import ROOT
from tests.ranks.test_families import IS_TRANSFORMERS_4

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(IS_TRANSFORMERS_4, reason="has not all of these families"),
]

# Family, and what it is refused with at one rank and at two; None: it is served rightly.
FAMILIES: dict[str, tuple[str | None, str | None]] = {
    "olmo2": (None, None),  # a norm over the heads of all ranks
    "deepseek_v3": (None, None),  # latent attention, experts stacked under other names
    "granitemoe": (None, None),  # no plan of transformers'; experts stacked in the checkpoint too
    "aria_text": (None, None),  # those transposed
    "glm4": (None, None),  # gate and up in one matrix
    "bitnet": (None, None),  # norms over the inputs of matrices that are split
    "gemma4_text": (None, None),  # heads per layer, shared keys, mixture beside an MLP
    "llama4_text": (None, None),  # chunks, positions in the attention, experts that scale inputs
    "gemma3n_text": (None, None),  # gates kept by the mean and deviation of all of them
    "bert": (None, None),  # buffers of its own, a bias of the head's under another name
    "mbart": (None, None),  # positions counted by place
    "stablelm": (None, None),  # layers that hand nothing on to their attention
    "moshi": ("keeps a window of them", "not known to be split rightly"),
    "granite_swa": (None, None),  # attention sinks
    "gpt_oss": (None, None),  # experts with biases, their gates and ups in turn
    "hy_v4": (None, None),  # tokens that an indexer chooses for some layers, attention sinks
    "mimo_v2_flash": (None, None),  # layers with twice as many key/value heads as others
    "mamba": ("no attention heads", "no attention heads"),
    "falcon_h1": (None, None),  # a state beside attention in every layer
    "zamba": ("do not attend", "not known to be split rightly"),
    "gptj": ("not among its attentions", "not among its attentions"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, Any]:
    """The checkpoints, and transformers' answers where it has some worth comparing."""
    made = {family: make_somehow(family, root / family) for family in FAMILIES}
    return {family: [] if isinstance(found, str) else found for family, found in made.items()}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_family_is_equal_or_refused_by_name(
    num_ranks: int, root: Path, expected: dict[str, Any]
) -> None:
    answers = serve_all(expected, num_ranks, root)
    for family, reasons in FAMILIES.items():
        reason = reasons[num_ranks - 1]
        if reason is None:
            assert answers[family] == expected[family], family
        else:
            assert answers[family].startswith("refused: "), (family, answers[family])
            assert reason in answers[family], (family, answers[family])


def test_a_refusal_is_one_line_and_exit_code_2(root: Path, expected: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "serving.py", "--model", str(root / "zamba"), "--device", "cpu",
         "--low-bit", "bf16", "--kv-cache-memory", "32MiB", "--port", "0"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "do not attend through" in errors[0]
    assert "Traceback" not in done.stderr
