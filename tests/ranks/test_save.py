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
from tests.ranks.launch import ROOT, mpirun
from tests.ranks.test_families import run_jobs

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The checkpoint converted while loading, and the folder saved at two ranks."""
    root = tmp_path_factory.mktemp("save")
    # Rows that three ranks shard unevenly; columns that four can shard in blocks of 64.
    model = save_tiny_llama(root / "model", num_hidden_layers=2, head_dim=64, intermediate_size=768)
    program = Path(__file__).with_name("save_program.py")
    subprocess.run(
        [*mpirun(), "-np", "2", sys.executable, program, model, root / "saved", "sym_int4"],
        check=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    prompts = [list(range(3, 3 + length)) for length in (1, 20, 90)]
    settings = {"max_model_len": 192, "max_num_batched_tokens": 48, "dtype": "float32"}
    job = {"prompts": prompts, "max_tokens": 12, "settings": settings}
    return [job | {"model": str(root / "model")}, job | {"model": str(root / "saved")}]


@pytest.fixture(scope="module")
def expected(jobs: list[dict], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Tokens of one rank that converts while it loads."""
    (tokens,) = run_jobs(jobs[:1], 1, tmp_path_factory.mktemp("expected"))
    assert isinstance(tokens, list), tokens
    return tokens


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_reloads_at_any_number_of_ranks(
    num_ranks: int, jobs: list[dict], expected: list[list[int]], tmp_path: Path
) -> None:
    assert run_jobs(jobs[1:], num_ranks, tmp_path) == [expected]


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
