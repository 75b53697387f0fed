"""Start a test program under mpirun, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def mpirun() -> list[str]:
    """The launcher of this environment, or else of this machine; Open MPI balks at root."""
    local = Path(sys.executable).with_name("mpirun")
    launcher = str(local) if local.exists() else "mpirun"
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
    return [launcher, "--allow-run-as-root"] if "Open MPI" in version else [launcher]


def run_ranks(num_ranks: int, *words: str | Path, **environ: str) -> str:
    """Run a Python program under mpirun; what it printed. One that fails fails the test."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*mpirun(), "-np", str(num_ranks), sys.executable, *words],
        timeout=500,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def run_program(name: str, num_ranks: int, model_path: Path, job: Any, folder: Path) -> Any:
    """Run tests/ranks/NAME.py on a job and return what it wrote."""
    in_path, out_path = folder / "in.json", folder / f"out{num_ranks}.json"
    in_path.write_text(json.dumps(job))
    run_ranks(num_ranks, Path(__file__).with_name(f"{name}.py"), model_path, in_path, out_path)
    return json.loads(out_path.read_text())


def run_jobs(jobs: list[dict[str, Any]], num_ranks: int, folder: Path, **environ: str) -> list[Any]:
    """Answer all jobs (see jobs_program.py) in one program, at `num_ranks`."""
    in_path, out_path = folder / f"in{num_ranks}.json", folder / f"out{num_ranks}.json"
    in_path.write_text(json.dumps(jobs))
    program = Path(__file__).with_name("jobs_program.py")
    run_ranks(num_ranks, program, in_path, out_path, **environ)
    return json.loads(out_path.read_text())
