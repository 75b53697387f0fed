"""litellm's proxy between OpenAI's client and the server: chats, responses, messages, tools."""

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

openai = pytest.importorskip("openai", reason="no openai here")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("litellm_proxy_extras") is None, reason="no litellm proxy here"
)

MASTER = "sk-master"
QUESTION = "What is AI?"
ANSWER = "branch of computer science"
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
ASKED = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def proxy(
    demo_server: Launch, calling_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Its address, before two servers."""
    folder = tmp_path_factory.mktemp("proxy")
    port = free_port()
    servers = (("demo", "demo_model", f"{demo_server.url}/v1"), ("caller", "letters", calling_url))
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": f"openai/{model}", "api_base": url, "api_key": KEY},
        }
        for name, model, url in servers
    ]
    config = {"model_list": models, "general_settings": {"master_key": MASTER}}
    (folder / "config.yaml").write_text(json.dumps(config))
    program = Path(sys.executable).with_name("litellm")
    command = [str(program), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    # Its table of models' prices is its own: nothing is fetched.
    settings = os.environ | {"HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=settings, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (
                folder / "log"
            ).read_text()[-2000:]
            try:
                if httpx.get(f"{url}/health/readiness").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def client(proxy: str) -> Any:
    return openai.OpenAI(base_url=f"{proxy}/v1", api_key=MASTER, max_retries=0, timeout=120)


def test_chat(client: Any) -> None:
    reply = client.chat.completions.create(model="demo", messages=ASKED, temperature=0)
    assert ANSWER in reply.choices[0].message.content
    assert reply.usage.completion_tokens > 0


def test_stream(client: Any) -> None:
    options = {"stream_options": {"include_usage": True}, "stream": True}
    chunks = client.chat.completions.create(
        model="demo", messages=ASKED, temperature=0, max_tokens=24, **options
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert ANSWER in "".join(pieces)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_and_its_result(client: Any, choice: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "1 + 2?"}]
    asked = {"model": "caller", "tools": [ADD]}
    reply = client.chat.completions.create(messages=messages, tool_choice=choice, **asked)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})
    messages.append(reply.choices[0].message.model_dump())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "3"})
    reply = client.chat.completions.create(messages=messages, **asked)
    assert reply.choices[0].message.content == "It is 3."


def test_responses(client: Any) -> None:
    reply = client.responses.create(model="demo", input=QUESTION, temperature=0)
    assert ANSWER in reply.output_text


def test_messages(proxy: str) -> None:
    body = {"model": "demo", "messages": ASKED, "max_tokens": 24, "temperature": 0}
    headers = {"x-api-key": MASTER, "anthropic-version": "2023-06-01"}
    reply = httpx.post(f"{proxy}/v1/messages", json=body, headers=headers, timeout=120)
    assert reply.status_code == 200, reply.text
    assert ANSWER in reply.json()["content"][0]["text"]
