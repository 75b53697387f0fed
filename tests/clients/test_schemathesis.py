"""schemathesis over /openapi.json: generated requests find no 5xx and no broken promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.live.launch import Launch

pytest.importorskip("schemathesis", reason="no schemathesis here")

NUM_EXAMPLES = 20

# A body may break a rule over several fields that JSON Schema cannot tell (best_of is at least n),
# and is then answered 400 as documented.
NOT_CHECKED = "positive_data_acceptance"


def test_a_bounded_run_finds_nothing(demo_server: Launch, base_url: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [str(Path(sys.executable).with_name("st")), "run", f"{demo_server.url}/openapi.json",
         "--header", f"Authorization: Bearer {KEY}", "--phases", "examples,coverage,fuzzing",
         "--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--workers", "2",
         "--request-timeout", "60", "--exclude-checks", NOT_CHECKED, "--no-color"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:]
    assert demo_server.health()["status"] == "ok"
