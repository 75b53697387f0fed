"""Sums over cards with the norm after them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.ranks.launch import ROOT


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA cards here")
def test_sums_over_cards_are_those_of_torch():
    command = [*(sys.executable, "-m", "torch.distributed.run"), "--nproc-per-node", "2", "-m"]
    command.append("tests.kernels.sums_program")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "all sums are right" in done.stdout, done.stderr[-2000:]
