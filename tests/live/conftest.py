"""Real servers on a tiny random checkpoint; one shared by all tests that do not end it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.crowd import FLAGS, PROGRAM
from tests.live.launch import CACHE_FLAGS, Launch, mpirun
from tests.model.checkpoints import save_tiny_llama


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def model_flags(model_path: Path) -> list[str]:
    """In float32, rounding is no excuse for different answers.

    With a cache of a given size, a machine whose memory others fill does not refuse to start.
    """
    dtypes = ["--low-bit", "bf16", "--dtype", "float32"]
    return ["--model", str(model_path), *dtypes, *CACHE_FLAGS]


@pytest.fixture(scope="session")
def server(model_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Two ranks under mpirun."""
    log_path = tmp_path_factory.mktemp("server") / "log"
    launch = Launch(mpirun(2), log_path, *model_flags, "--max-num-seqs", "8")
    try:
        yield launch.wait_ready()
    finally:
        launch.clean_up()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Starts servers of a test's own; whatever becomes of them, they end with it."""
    launches: list[Launch] = []
    numbers = itertools.count()

    def start_one(launcher: list[str], *flags: str, **options: Any) -> Launch:
        launches.append(Launch(launcher, tmp_path / f"log{next(numbers)}", *flags, **options))
        return launches[-1]

    yield start_one
    for launch in launches:
        launch.clean_up()


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """The embedded model on two ranks, in its own bfloat16, for those who need a real text."""
    log_path = tmp_path_factory.mktemp("demo_server") / "log"
    launch = Launch(mpirun(2), log_path, *FLAGS, "--tool-call-parser", "hermes", program=PROGRAM)
    try:
        yield launch.wait_ready()
    finally:
        launch.clean_up()
