"""KV blocks in files of two ranks: found by the next server, and dropped where one is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks.launch import ROOT, run_ranks

pytestmark = pytest.mark.ranks


def test_the_next_server_goes_on_with_what_is_undamaged(tmp_path: Path) -> None:
    program = Path(__file__).with_name("offload_program.py")
    text = run_ranks(2, program, ROOT / "demo_model", tmp_path / "kv")
    runs = [json.loads(line) for line in text.splitlines() if line.startswith("[[")]
    stored, loaded, damaged = runs
    assert stored[0] == loaded[0] == damaged[0]
    assert stored[1] == 48  # of the second prompt
    assert loaded[1] == 128 + 80  # all blocks but those of the last tokens
    assert damaged[1] == 80  # the first prompt was computed, the second goes on from its blocks
    assert text.count("damaged") == 1
