"""transformers' own `generate`, in BF16. No rank."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.environments import INSIDE, Environment
from benchmarks.peers.processes import Launch

VERSION = "5.23.0"
FORMATS = {"bf16": "bf16"}  # and ours that is most like it

ENVIRONMENT = Environment("transformers_generate")


def set_up() -> dict[str, str]:
    """Install; returns versions."""
    ENVIRONMENT.install(["install", f"transformers=={VERSION}"], torch="2.13.0")
    return ENVIRONMENT.versions("transformers", "torch")


def launch(checkpoint: Path, name: str, threads: int) -> Launch:
    """The model behind a small HTTP server; the eight requests run as one static batch."""
    script = str(INSIDE / "serve_transformers.py")
    words = (str(ENVIRONMENT.python), script, str(checkpoint), "{port}", str(threads))
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return Launch(f"transformers {name.upper()}", words, environment)
