"""Clients that are programs: npm's libraries, and agents that send long prompts of their own.

The agents' prompts are longer than the demo model has learned to read: a copy of it with more
positions answers them, with words that mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import DEMO, KEY, launch_demo
from tests.live.launch import Launch

NODE = Path(os.environ.get("NODE_CLIENTS", "")) / "node_modules"
needs_node = pytest.mark.skipif(
    not os.environ.get("NODE_CLIENTS") or shutil.which("node") is None,
    reason="no npm packages here (run_tests.sh --clients installs them)",
)
QUESTION = "What is AI?"
ANSWER = "branch of computer science"
LONGEST = 65536
NUM_TOKENS = 32


def run(command: list[str], folder: Path, **environ: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"HOME": str(folder)} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@needs_node
@pytest.mark.parametrize(
    "way",
    ["openai chat", "openai stream", "openai responses", "ai default", "ai stream", "ai chat",
     "ai compatible", "ai object", "ai tool"],
)  # fmt: skip
def test_libraries_of_node(base_url: str, way: str, tmp_path: Path) -> None:
    script = NODE.parent / "clients.mjs"
    text = run(["node", str(script), way], tmp_path, OPENAI_BASE_URL=base_url, OPENAI_API_KEY=KEY)
    if way in ("ai object", "ai tool"):
        assert json.loads(text)["verdict"] in ("yes", "no")
    else:
        assert ANSWER in text


@pytest.fixture(scope="module")
def long_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Two ranks of the copy. Its answers are short: some agents ask for as much as there is."""
    folder = tmp_path_factory.mktemp("long")
    model = folder / "demo_model"
    shutil.copytree(DEMO, model, ignore=shutil.ignore_patterns("training"))
    settings = {"config.json": {"max_position_embeddings": LONGEST},
                "generation_config.json": {"max_new_tokens": NUM_TOKENS}}  # fmt: skip
    for name, changes in settings.items():
        changed = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps(changed))
    flags = ("--model", str(model), "--kv-cache-memory", "1GiB", "--tool-call-parser", "hermes")
    launch = launch_demo(folder / "log", *flags)
    try:
        yield launch.wait_ready()
    finally:
        launch.clean_up()


@needs_node
def test_codex(long_server: Launch, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'model = "demo_model"\nmodel_provider = "autotp"\n[model_providers.autotp]\n'
        f'name = "autotp"\nbase_url = "{long_server.url}/v1"\nenv_key = "OPENAI_API_KEY"\n'
        'wire_api = "responses"\nrequest_max_retries = 0\nstream_max_retries = 0\n'
    )
    command = [str(NODE / ".bin" / "codex"), "exec", "--skip-git-repo-check", QUESTION]
    assert run(command, tmp_path, CODEX_HOME=str(tmp_path), OPENAI_API_KEY=KEY)


@needs_node
def test_claude_code(long_server: Launch, tmp_path: Path) -> None:
    told = {
        "ANTHROPIC_BASE_URL": long_server.url,
        "ANTHROPIC_AUTH_TOKEN": KEY,
        "ANTHROPIC_MODEL": "demo_model",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "demo_model",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    assert run([str(NODE / ".bin" / "claude"), "-p", QUESTION], tmp_path, **told)


def test_aider(long_server: Launch, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("aider")
    if not program.exists():
        pytest.skip("no aider here")
    flags = ("--no-git", "--no-check-update", "--analytics-disable", "--no-show-model-warnings",
             "--yes-always", "--model", "openai/demo_model", "--message", QUESTION)  # fmt: skip
    told = {"OPENAI_API_BASE": f"{long_server.url}/v1", "OPENAI_API_KEY": KEY}
    text = run([str(program), *flags], tmp_path, **told)
    assert "sent," in text and "received." in text
