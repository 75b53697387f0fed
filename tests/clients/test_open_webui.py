"""Open WebUI's backend between a browser and the server: chats, and chats with its tools."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import KEY
from tests.live.launch import Launch, free_port

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("open_webui") is None, reason="no Open WebUI here"
)

SCRIPTED = "letters"
ADDER = '''
class Tools:
    def add(self, a: int, b: int) -> str:
        """
        Add two numbers.
        :param a: one of them
        :param b: the other
        """
        return str(a + b)
'''
SECONDS = 300.0


@pytest.fixture(scope="module")
def webui(
    demo_server: Launch, calling_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """Signed in, with a tool of its own, before two servers."""
    folder = tmp_path_factory.mktemp("webui")
    port = free_port()
    settings = {
        "DATA_DIR": str(folder),
        "HOME": str(folder),
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "secret",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",  # or it fetches a model of its own
        "ENABLE_OLLAMA_API": "False",
        "OPENAI_API_BASE_URLS": f"{demo_server.url}/v1;{calling_url}",
        "OPENAI_API_KEYS": f"{KEY};{KEY}",
    }
    program = Path(sys.executable).with_name("open-webui")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(program), "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=os.environ | settings, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as http:
            _wait_ready(http, process, folder / "log")
            login = http.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
            http.headers["Authorization"] = f"Bearer {login['token']}"
            tool = {"id": "adder", "name": "adder", "content": ADDER, "meta": {"description": "x"}}
            assert http.post("/api/v1/tools/create", json=tool).status_code == 200
            models = {one["id"] for one in http.get("/api/models").json()["data"]}
            assert models >= {"demo_model", SCRIPTED}
            yield http
    finally:
        process.terminate()
        process.wait(60)


def _wait_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def ask(
    webui: httpx.Client, text: str, model: str = "demo_model", **options: Any
) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    reply = webui.post("/api/chat/completions", json=body | options)
    assert reply.status_code == 200, reply.text
    return reply


def test_chat(webui: httpx.Client) -> None:
    reply = ask(webui, "What is AI?", max_tokens=24).json()
    assert "branch of computer science" in reply["choices"][0]["message"]["content"]


def test_stream(webui: httpx.Client) -> None:
    lines = ask(webui, "What is AI?", max_tokens=24, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [one["delta"] for chunk in chunks for one in chunk["choices"]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert "branch of computer science" in text


@pytest.mark.parametrize("way", ["native", "default"])
def test_its_tools_go_with_a_chat(webui: httpx.Client, way: str) -> None:
    """To a model whose template knows none, as the demo's: it answers without them."""
    options = {"tool_ids": ["adder"], "params": {"function_calling": way}, "max_tokens": 24}
    reply = ask(webui, "What is AI?", **options).json()
    assert reply["choices"][0]["message"]["content"]


def test_a_call_of_its_tool_comes_back(webui: httpx.Client) -> None:
    options = {"tool_ids": ["adder"], "params": {"function_calling": "native"}}
    message = ask(webui, "1 + 2?", SCRIPTED, **options).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": 2}
