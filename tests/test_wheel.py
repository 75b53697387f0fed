"""What `pip install .` brings: two commands, and all that they read. Without the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.launch import CACHE_FLAGS, ROOT, Launch

SOURCES = ("autotp_serving", "benchmarks", "prompt", "serving.py", "benchmark.py")
SETTINGS = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders, and takes what an earlier one left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, *SETTINGS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(sys.executable, "-m", "pip", "wheel", *flags, "-w", "dist", ".", cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a fresh environment, which sees the packages of this one."""
    venv = tmp_path_factory.mktemp("fresh") / "an environment"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    where = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv
    ).strip()
    Path(where, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index")
    run(*pip, "--no-deps", wheel, cwd=venv)
    return venv / "bin"


def test_the_wheel_has_what_the_programs_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".html", ".json", ".txt"}
    for folder in ("autotp_serving", "benchmarks", "prompt"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in str(path)}
        assert {Path(name).suffix for name in expected} <= suffixes, "name it in pyproject.toml"
        assert expected <= names
    assert not any(name.startswith(("tests", "demo_model")) for name in names)


@pytest.fixture
def server(programs: Path, tmp_path: Path) -> Iterator[Launch]:
    flags = ("--model", str(ROOT / "demo_model"), "--low-bit", "bf16", *CACHE_FLAGS)
    elsewhere = ("env", "-u", "PYTHONPATH", "-C", str(tmp_path))
    launcher = [*elsewhere, str(programs / "autotp-serve")]
    launch = Launch(launcher, tmp_path / "log", *flags, program=())
    try:
        yield launch.wait_ready()
    finally:
        launch.clean_up()


@pytest.mark.live
def test_the_commands_work_where_no_checkout_is(
    programs: Path, server: Launch, tmp_path: Path
) -> None:
    assert run(programs / "autotp-serve", "--version", cwd=tmp_path).startswith("AutoTP Serving ")
    flags = ("--prompt_length", "32", "--max_new_tokens", "4", "--num_requests", "2")
    run(programs / "autotp-bench", "--url", server.url, *flags, cwd=tmp_path)
    (level,) = json.loads((tmp_path / "benchmark.json").read_text())["levels"]
    assert level["summary"]["completed"] == 2
