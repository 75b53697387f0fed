"""Where the peers live: one virtual environment each, checkpoints, builds, logs. No rank."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venv-peers"
INSIDE = Path(__file__).parent / "inside"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


class PeerError(Exception):
    """A peer that cannot be set up or run; the message is one line with cause and cure."""


def say(text: str) -> None:
    """Tell the reader what takes the time."""
    print(f"==> {text}", file=sys.stderr, flush=True)


def run_logged(
    words: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command into a log file. Raises PeerError naming the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {' '.join(map(str, words))}\n".encode())
        file.flush()
        code = subprocess.call(
            [str(word) for word in words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            cwd=ROOT,
        )
    if code:
        raise PeerError(f"{Path(str(words[0])).name} ended with {code}: see the end of {log}")


def make_once(target: Path, key: str, make: Callable[[], None]) -> None:
    """Call `make` unless `target` was finished before from the same `key`."""
    stamp = target.with_name(f".{target.name}.made")
    digest = hashlib.sha256(key.encode()).hexdigest()
    if target.exists() and stamp.is_file() and stamp.read_text() == digest:
        return
    stamp.unlink(missing_ok=True)
    make()
    stamp.write_text(digest)


class Environment:
    """One peer's virtual environment."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = HOME / name
        self.python = self.folder / "venv" / "bin" / "python"
        self.log = self.folder / "setup.log"

    def install(self, *steps: Sequence[str], torch: str | None = None) -> None:
        """Make it, install torch, run `pip` with the words of each step; once only."""

        def make() -> None:
            version = ".".join(map(str, sys.version_info[:2]))
            say(f"{self.name}: installing into {self.folder} (Python {version}; minutes)")
            self.folder.mkdir(parents=True, exist_ok=True)
            run_logged((sys.executable, "-m", "venv", "--clear", self.python.parents[1]), self.log)
            for step in ([torch_step(torch)] if torch else []) + [*steps]:
                run_logged((self.python, "-m", "pip", *step), self.log)

        make_once(self.python.parents[1], repr((sys.version, torch, steps)), make)

    def run(self, script: str, *words: str | Path) -> None:
        """Run one of the scripts in `inside/` with this environment's Python."""
        run_logged((self.python, INSIDE / script, *words), self.log)

    def versions(self, *packages: str) -> dict[str, str]:
        """What is installed, for the table."""
        code = (
            "import sys\nfrom importlib.metadata import version\n"
            "for name in sys.argv[1:]: print(version(name))"
        )
        output = subprocess.run(
            [self.python, "-c", code, *packages], capture_output=True, text=True, check=True
        ).stdout
        return dict(zip(packages, output.split(), strict=True))


def torch_step(version: str) -> list[str]:
    """The pip words that install torch without CUDA's gigabytes where its CPU index answers."""
    import urllib.request

    try:
        urllib.request.urlopen(f"{CPU_TORCH_INDEX}/torch/", timeout=5)
    except OSError:
        return ["install", f"torch=={version}"]
    return ["install", "--index-url", CPU_TORCH_INDEX, f"torch=={version}"]
