"""Saved low-bit at two ranks, reloaded at one to four: the same greedy tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotp_serving.low_bit.selection import MANIFEST_NAME
from autotp_serving.model_folder import INDEX_NAME
from tests.model.checkpoints import save_tiny_llama
from tests.ranks.launch import ROOT, run_jobs, run_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The checkpoint converted while loading, and the folder saved at two ranks."""
    root = tmp_path_factory.mktemp("save")
    # Rows that three ranks shard unevenly; columns that four can shard in blocks of 64.
    model = save_tiny_llama(root / "model", num_hidden_layers=2, head_dim=64, intermediate_size=768)
    run_ranks(2, "tests/ranks/save_program.py", "sym_int4", model, root / "saved")
    prompts = [list(range(3, 3 + length)) for length in (1, 20, 90)]
    settings = {"max_model_len": 192, "max_num_batched_tokens": 48, "dtype": "float32"}
    job = {"prompts": prompts, "max_tokens": 12, "settings": settings}
    return [job | {"model": str(root / "model")}, job | {"model": str(root / "saved")}]


def test_reloads_at_any_number_of_ranks(jobs: list[dict], tmp_path: Path) -> None:
    """The tokens are those of one rank that converts while it loads."""
    converted, reloaded = run_jobs(jobs, 1, tmp_path)
    assert isinstance(converted, list), converted
    assert reloaded == converted
    for num_ranks in (2, 3, 4):
        assert run_jobs(jobs[1:], num_ranks, tmp_path) == [converted], num_ranks


def test_torchrun_saves_every_ranks_part(jobs: list[dict], tmp_path: Path) -> None:
    """Its ranks did not wait for one another, and rank 0 listed its own tensors alone."""
    torchrun = Path(sys.executable).with_name("torchrun")
    model, saved = Path(jobs[0]["model"]), Path(jobs[1]["model"])
    subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", "serving.py", "--model", model,
         "--low-bit", "sym_int4", "--device", "cpu", "--save-low-bit", tmp_path / "saved"],
        check=True, timeout=200, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for name in (INDEX_NAME, MANIFEST_NAME):
        found, expected = (
            json.loads((one / name).read_text()) for one in (tmp_path / "saved", saved)
        )
        assert found == expected
