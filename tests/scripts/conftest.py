"""A copy of the launch scripts in a folder of its own, with stand-ins for what they start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_MPIRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/arguments"
env > "$RECORD/environment"
exit "${FAKE_EXIT:-0}"
"""


class ScriptTree:
    """The shell scripts copied beside a fake `mpirun`; `run` starts one of them."""

    def __init__(self, folder: Path, venv: Path) -> None:
        self.venv = venv
        self.root = folder / "tree"
        self.record = folder / "record"
        self.bin = folder / "bin"
        for path in (self.root, self.record, self.bin):
            path.mkdir()
        for script in ROOT.glob("*.sh"):
            shutil.copy(script, self.root)
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "requirements.txt").write_text("# nothing to install\n")
        (self.root / "requirements").mkdir()
        (self.root / "requirements/dev.txt").write_text("# nothing to install\n")
        (self.root / "requirements/ipex-llm.txt").write_text("# nothing to install\n")
        (self.root / "demo_model").mkdir()
        (self.root / "demo_model" / "config.json").write_text("{}")
        self.fake("mpirun", FAKE_MPIRUN)

    def fake(self, name: str, text: str) -> None:
        """Put an executable of this name first on the PATH."""
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of the tree in a clean environment and return what it printed."""
        kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            env=kept
            | {
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "RECORD": str(self.record),
                "VENV": str(self.venv),
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def arguments(self) -> list[str]:
        """What `mpirun` was called with."""
        return (self.record / "arguments").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        """The environment that `mpirun` was called in."""
        lines = (self.record / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture(scope="session")
def shared_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One environment for all trees: making one takes seconds."""
    folder = tmp_path_factory.mktemp("shared")
    tree = ScriptTree(folder, folder / "venv")
    assert tree.run("run_demo.sh").returncode == 0
    return tree.venv


@pytest.fixture
def tree(tmp_path: Path, shared_venv: Path) -> ScriptTree:
    """A tree whose requirements are installed already."""
    return ScriptTree(tmp_path, shared_venv)


@pytest.fixture
def fresh_tree(tmp_path: Path) -> ScriptTree:
    """A tree that nothing has been installed for yet."""
    return ScriptTree(tmp_path, tmp_path / "tree" / ".venv")
