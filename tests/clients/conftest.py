"""Servers with a key and tools, for clients that live in an environment of their own.

SERVER_PYTHON names the servers' own interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.conftest import LiveServer
from tests.live.launch import CACHE_FLAGS, ROOT, Launch

KEY = "client-key"
# As the grammar of calls has it, where a client asks for strict tools.
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
DEMO = ROOT / "demo_model"
SERVER_PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)


def launch_demo(log_path: Path, *flags: str) -> Launch:
    """The embedded model on two ranks, as the README starts it."""
    mpirun = [str(Path(SERVER_PYTHON).with_name("mpirun")), "-np", "2", "--prepend-rank"]
    flags = ("--model", str(DEMO), "--low-bit", "bf16", "--api-key", KEY, *CACHE_FLAGS, *flags)
    return Launch([*mpirun, SERVER_PYTHON], log_path, *flags)


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """The live server that all share. Answers are short, or generated bodies would take hours."""
    log_path = tmp_path_factory.mktemp("demo_server") / "log"
    limits = ["--max-num-seqs", "32", "--max-model-len", "512"]
    launch = launch_demo(log_path, *limits, "--tool-call-parser", "hermes")
    try:
        yield launch.wait_ready()
    finally:
        launch.clean_up()


@pytest.fixture
def base_url(demo_server: Launch) -> Iterator[str]:
    """Where its OpenAI routes begin. Whatever a client did, nothing is kept of it."""
    yield f"{demo_server.url}/v1"
    demo_server.wait_idle(60)


@pytest.fixture(scope="session")
def calling_url() -> Iterator[str]:
    """The same of a server with a scripted model, which calls a tool of its own accord."""
    options = {
        "config": {"port": 0, "api_key": [KEY], "tool_call_parser": "hermes"},
        "book": {
            "tool add\nuser: 1 + 2?\nassistant: ": CALL,
            "tool add\nuser: 1 + 2?\nassistant: \ntool: 3\nassistant: ": "It is 3.",
            # As it reads a call that comes back without content.
            "tool add\nuser: 1 + 2?\nassistant: None\ntool: 3\nassistant: ": "It is 3.",
        },
    }
    server = LiveServer(options, python=SERVER_PYTHON)
    yield server.url.replace("0.0.0.0", "127.0.0.1") + "/v1"
    server.stop()
