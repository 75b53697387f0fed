"""Large bodies are looked through elsewhere; rank 0 parses only those that may be right."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from typing import Any

import pytest
from starlette.requests import Request

from autotp_serving.api import large_bodies
from autotp_serving.engine import large_body
from autotp_serving.engine.large_body import find_problem
from autotp_serving.engine.sandbox import Spool
from tests.api import service

LONG = 300_000
FILL = " " * large_bodies.MIN_LARGE_BYTES


def image(url: str) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]


def many(name: str, count: int) -> bytes:
    return f'{{"prompt": "a", "{name}": [{"1," * count}1]}}'.encode()


WRONG: dict[str, tuple[str, Any, int, str | None, str]] = {
    "text": ("/generate", {"prompt": "a" * LONG}, 400, "prompt", "300000 characters"),
    "texts": ("/v1/completions", {"prompt": ["a", "b" * LONG]}, 400, "prompt", "--max-model-len"),
    "ids": ("/v1/completions", {"prompt": [9] * LONG}, 400, "prompt", "300000 tokens"),
    "ids in a list": ("/v1/completions", {"prompt": [[9], [9] * LONG]}, 400, "prompt", "tokens"),
    "message": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a" * LONG}]},
        400, "messages", "300000 characters",
    ),
    "image": (
        "/v1/chat/completions", {"messages": image("a" * LONG)}, 400, "messages", "text only",
    ),
    "stop": ("/generate", {"prompt": "a", "stop": "s" * LONG}, 400, "stop", "characters"),
    "listed": ("/tokenize", {"prompt": "a" * 10 * LONG}, 400, "prompt", "131072"),
    "tokens": ("/detokenize", {"tokens": [97] * LONG}, 400, "tokens", "131072"),
    "not JSON": ("/generate", FILL.encode() + b'{"prompt" "a"}', 400, None,
                 "not JSON: Expecting ':' delimiter at character 262154"),
    "depth": ("/generate", b'{"prompt": ' + b"[" * LONG, 400, None, "cannot be read as JSON"),
    "no text": ("/generate", b'{"prompt": "\xff"}' + FILL.encode(), 400, None, "cannot be read"),
    "values": ("/generate", many("prompt", 1_000_001), 413, None, "more than 1000000 values"),
    "entries": ("/generate", many("xyz", 2**17), 400, "xyz", "at most 16384 entries"),
    "other values": (
        "/generate", {"prompt": "a", "b": [[1] * 999] * 132}, 413, "b", "more than 131072 values",
    ),
}  # fmt: skip


async def send(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    async with service.client() as (http, _):
        reply = await http.post(path, content=body)
        return reply.status_code, reply.json()


def test_what_is_wrong_is_said_without_parsing_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: Request) -> None:
        raise AssertionError("parsed on rank 0")

    monkeypatch.setattr(Request, "json", refuse)

    async def send_all() -> None:
        async with service.client() as (http, _):
            for name, (path, body, status, param, words) in WRONG.items():
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                reply = await http.post(path, content=content)
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (status, param), (name, error)
                assert words in error["message"], (name, error)

    asyncio.run(send_all())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", b'{"prompt": "a", "n_predict": 1}'),
        ("/tokenize", json.dumps({"prompt": "a" * 131_000}).encode()),
        ("/v1/completions", json.dumps({"prompt": [[97] * 500] * 20, "max_tokens": 1}).encode()),
    ],
)
def test_one_that_is_right_is_served(path: str, body: bytes) -> None:
    status, _ = asyncio.run(send(path, FILL.encode() + body))
    assert status == 200


def test_memory_is_given_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    path, body = "/generate", FILL.encode() + b'{"prompt": "a", "n_predict": 1}'
    asyncio.run(send(path, body))
    names = []
    for number in set(os.listdir("/proc/self/fd")) - before:
        if os.path.exists(f"/proc/self/fd/{number}"):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    assert not [name for name in names if "memfd" in name]


def test_no_room_for_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Spool, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "write", fail)
    status, reply = asyncio.run(send("/generate", FILL.encode() + b'{"prompt": "a"}'))
    assert (status, reply["error"]["code"]) == (503, "busy")
    assert "No space left" in reply["error"]["message"]


def test_a_worker_that_runs_out_of_memory_is_the_bodys_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large_bodies, "CPU_SECONDS", 0.001)
    text = json.dumps({"x": [{"a": [1, 2, 3]}] * 120_000}).encode()
    status, reply = asyncio.run(send("/generate", text))
    assert status in (413, 503), reply  # 503 where the machine gave it no time


def look(body: bytes, **limits: int) -> Any:
    file = Spool()
    file.write(body)
    limits = {"max_chars": 10, "max_tokens": 4} | limits
    return find_problem(file.descriptor, len(body), **limits)


def test_limits_are_met_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(b'{"prompt": "0123456789", "stop": ["0123456789"]}') is None
    assert look(b'{"prompt": "0123456789a"}') == {
        "problem": "num_chars", "field": "prompt", "length": 11,
    }  # fmt: skip
    assert look(b'{"a": {"0123456789a": 1}}')["field"] == "a"
    assert look(b'{"0123456789a": 1}')["problem"] == "num_chars"
    assert look(b'{"a": [1, 2, 3, 4, 5]}') is None
    assert look(b'{"prompt": [1, 2, 3, 4]}') is None
    assert look(b'{"prompt": [1, 2, 3, 4, 5]}')["problem"] == "num_tokens"
    assert look(b'{"messages": [{}, {}, {}, {}, {}]}') is None
    assert look(b"[1, 2, 3, 4, 5]") is None  # rank 0 says what a body has to be
    monkeypatch.setattr(large_body, "MAX_JSON_VALUES", 4)
    assert look(b'{"a": [1, 2]}') is None
    assert look(b'{"a": [1, 2, 3, 4]}') == {"problem": "num_values", "limit": 4}


def test_a_file_that_is_shorter_than_said() -> None:
    file = Spool()
    file.write(b"{}")
    assert find_problem(file.descriptor, 3, 10, 10) == {"problem": "unreadable"}
    assert file.read() == b"{}"
