"""Requests meant to crash, loop or fill the memory, sent to real ranks while others are served."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_bombs import GRAMMARS, chain, nest
from tests.live.launch import Launch

pytestmark = pytest.mark.live

BOMBS: dict[str, dict[str, Any]] = {
    **{name: fields for name, fields in GRAMMARS.items() if name != "tool"},
    "many links": {"guided_json": chain(700)},
    "deep schema": {"guided_json": nest({}, 400)},
    "exponential": {"guided_regex": "(a|b)*a(a|b){999}c"},
    "repeats": {"guided_regex": "((a{1,1000}){1,1000}){1,1000}b"},
    "values": {"guided_json": {"enum": [f"value {number}" for number in range(9000)]}},
    "product": {"guided_json": {"allOf": [{"anyOf": [
        {"properties": {f"k{number}": {"type": "integer"}}} for number in range(5)]}] * 9}},
    "ambiguous": {"guided_grammar": 'start: a\na: a a | a a a | "x" |'},
    "prompt": {"prompt": "The quick brown fox. " * 1_000_000},
    "blanks": {"prompt": " " * 9_000_000},
    "many prompts": {"prompt": ["a" * 2000] * 2000},
    "stop": {"stop": ["a" * 100_000]},
}  # fmt: skip
REFUSED = {*GRAMMARS, "deep schema", "product", "prompt", "blanks", "stop"} - {"tool"}


def resident_mib(pid: int) -> int:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def test_bombs_cost_their_own_requests(server: Launch) -> None:
    """The chain of 1,000 references ended rank 0 with signal 11 and cut every stream."""
    pids = server.rank_pids()
    before = resident_mib(pids[0])
    probes: list[float] = []
    is_over = threading.Event()

    def probe() -> None:
        while not is_over.is_set():
            started = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
            probes.append(time.monotonic() - started)
            time.sleep(0.05)

    watcher = threading.Thread(target=probe)
    expected = server.generate("a neighbour", 300)
    with server.stream("a neighbour", 300) as lines:
        pieces = [next(lines)["message"]["content"]]
        watcher.start()
        try:
            for name, fields in BOMBS.items():
                body = {"prompt": "a", "max_tokens": 16} | fields
                reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
                assert reply.status_code < 500 or reply.json()["error"]["code"] == "busy", name
                if name in REFUSED:
                    assert reply.status_code in (400, 503), (name, reply.text[:300])
                print(name, reply.status_code, reply.text[:120])
        finally:
            is_over.set()
            watcher.join()
        pieces += [line["message"]["content"] or "" for line in lines]
    assert "".join(pieces) == expected
    assert server.rank_pids() == pids
    server.wait_idle()
    server.wait_for(lambda: resident_mib(pids[0]) < before + 150, 20.0)
    assert max(probes) < 3.0
    assert "Traceback" not in server.log and "panicked" not in server.log
