"""Ranks that join their group."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ranks.launch import ROOT, mpirun

pytestmark = pytest.mark.ranks

JOIN_TWICE = """
import os
from autotp_serving.distributed.launch import join_group
for _ in range(2):
    assert join_group(os.environ).all_gather("value") == ["value"] * 2
"""


def test_a_program_may_join_more_than_once() -> None:
    """As a script does that makes two LLMs. MPI complains at its end of sockets that it lost."""
    done = subprocess.run(
        [*mpirun(), "-np", "2", sys.executable, "-c", JOIN_TWICE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
