"""Which launcher the head takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autotp_serving.head import ranks


def test_mpirun_is_taken_where_it_works_and_torchrun_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks.find_launcher(1) == []
    mpirun, *flags = ranks.find_launcher(3)
    assert mpirun.endswith("mpirun") and flags == ["--prepend-rank", "-np", "3"]
    broken = tmp_path / "mpirun"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(ranks.shutil, "which", lambda *_, **__: str(broken))
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    assert ranks.find_launcher(2)[:3] == torchrun
