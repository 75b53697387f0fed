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


def run_program(name: str, num_ranks: int, model_path: Path, job: Any, folder: Path) -> Any:
    """Run tests/ranks/NAME.py on a job and return what it wrote."""
    in_path, out_path = folder / "in.json", folder / f"out{num_ranks}.json"
    in_path.write_text(json.dumps(job))
    program = Path(__file__).with_name(f"{name}.py")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    arguments = [str(program), str(model_path), str(in_path), str(out_path)]
    subprocess.run(
        [*mpirun(), "-np", str(num_ranks), sys.executable, *arguments],
        check=True,
        timeout=400,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    return json.loads(out_path.read_text())
