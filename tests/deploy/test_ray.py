"""deploy/ray on a real cluster: two raylets, the demo model, replicas that come and go.

Needs Ray's environment (`bash run_tests.sh --ray`); SERVER_PYTHON names the server's interpreter.
`-s` prints the figures of docs/scale.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")
aiohttp = pytest.importorskip("aiohttp")

from pydantic import ValidationError  # noqa: E402
from ray import serve  # noqa: E402

from deploy.ray.application import Seat, Settings, build, find_prompt, tell_ranks  # noqa: E402

ROOT = Path(__file__).parents[2]
SERVER_PYTHON = os.environ.get("SERVER_PYTHON", str(ROOT / ".venv/bin/python"))
RAY = str(Path(sys.executable).with_name("ray"))
APPLICATION = "default"
SUBJECTS = ("tea", "ships", "rivers", "music", "maps", "glass", "bread", "winter")
PATIENCE = 480.0


def find_free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def list_descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(words[1]), []).append(int(path.parent.name))
    found, open_ = [], [pid]
    while open_:
        of_one = children.get(open_.pop(), [])
        found += of_one
        open_ += of_one
    return found


def list_ranks(nodes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Rank processes of the cluster, without the small ones that stand before them."""
    found = []
    for pid in (pid for node in nodes for pid in list_descendants(node.pid)):
        with contextlib.suppress(OSError):
            if b"serving.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two nodes of two CPUs each, and Serve's proxy on one of them."""
    log = (tmp_path_factory.mktemp("ray") / "log").open("wb")
    address = f"127.0.0.1:{find_free_port()}"
    environ = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "5",  # 15 unless told otherwise, and ranks inherit it
        "PYTHONPATH": str(ROOT),
    }
    common = ("--num-cpus", "2", "--object-store-memory", "100000000")
    nodes = []
    for words in (
        ("--head", "--port", address.partition(":")[2], "--include-dashboard", "false"),
        ("--address", address),
    ):
        nodes.append(
            subprocess.Popen(
                [RAY, "start", "--block", "--node-ip-address", "127.0.0.1", *words, *common],
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )
        time.sleep(8)
    try:
        for _ in range(20):
            with contextlib.suppress(ConnectionError):
                ray.init(address, namespace="serve", log_to_driver=False)
                break
            time.sleep(1)
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, "two nodes", 60)
        yield nodes
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        for node in nodes:
            everyone = [node.pid, *list_descendants(node.pid)]
            for pid in everyone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()
        log.close()


def wait_for(is_so: Any, what: str, seconds: float = PATIENCE) -> float:
    """Seconds until it is so."""
    start = time.monotonic()
    while not is_so():
        assert time.monotonic() < start + seconds, f"no {what} within {seconds:.0f} s"
        time.sleep(0.25)
    return time.monotonic() - start


def deploy(port: int, **args: Any) -> None:
    settings = {"python": SERVER_PYTHON, "server_flags": "--low-bit sym_int8 --max-model-len 2048"}
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(settings | args), name=APPLICATION)


def count_running() -> int:
    status = serve.status().applications[APPLICATION].deployments["Group"]
    return int(status.replica_states.get("RUNNING", 0))


def list_replicas() -> list[str]:
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if "#Group#" in name]


@dataclass
class Load:
    """Clients that ask again and again until told to stop, and what came of it.

    Attributes:
        texts: all answers to a question, which must be one and the same.
        losses: requests without a whole answer, by how they ended.
        num_cut: streams that ended early; what has been sent cannot be asked for again.
    """

    url: str
    texts: dict[str, set[str]] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)
    num_answered: int = 0
    num_retried: int = 0
    num_streamed: int = 0
    num_cut: int = 0
    num_prompt_tokens: int = 0
    num_cached: int = 0
    is_over: bool = False

    async def run(self, num_clients: int, num_streams: int) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with aiohttp.ClientSession(self.url, timeout=timeout) as session:
            await asyncio.gather(
                *(self._ask(session, number) for number in range(num_clients)),
                *(self._listen(session) for _ in range(num_streams)),
            )

    async def _ask(self, session: Any, number: int) -> None:
        turn = number
        while not self.is_over:
            subject = SUBJECTS[turn % len(SUBJECTS)]
            turn += 1
            prompt = f"A long introduction to {subject}. " * 20 + f"What is {subject}?"
            body = {"model": "demo_model", "prompt": prompt, "max_tokens": 32, "temperature": 0}
            try:
                async with session.post("/v1/completions", json=body) as answer:
                    document = await answer.json()
                    assert answer.status == 200, str(document)
            except (aiohttp.ClientError, TimeoutError, AssertionError) as error:
                self.losses[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            self.num_answered += 1
            self.num_retried += "X-Retries" in answer.headers
            self.texts.setdefault(subject, set()).add(document["choices"][0]["text"])
            usage = document["usage"]
            self.num_prompt_tokens += usage["prompt_tokens"]
            self.num_cached += usage["prompt_tokens_details"]["cached_tokens"]

    async def _listen(self, session: Any) -> None:
        body = {"model": "demo_model", "prompt": "What is AI?", "max_tokens": 64, "stream": True}
        while not self.is_over:
            last = b""
            try:
                async with session.post("/v1/completions", json=body) as answer:
                    async for line in answer.content:
                        last = line.strip() or last
            except aiohttp.ClientError:
                pass
            self.num_streamed += 1
            self.num_cut += last != b"data: [DONE]"

    def tell(self) -> str:
        return (
            f"{self.num_answered} answered, {self.num_retried} of them asked again, "
            f"{self.losses.total()} lost, {self.num_cut} of {self.num_streamed} streams cut, "
            f"{self.num_cached / max(1, self.num_prompt_tokens):.0%} of prompts' tokens cached"
        )


@contextlib.asynccontextmanager
async def loaded(url: str, num_clients: int, num_streams: int = 0) -> AsyncIterator[Load]:
    load = Load(url)
    running = asyncio.create_task(load.run(num_clients, num_streams))
    try:
        yield load
    finally:
        load.is_over = True
        await running


async def wait_here(is_so: Any, what: str) -> float:
    return await asyncio.to_thread(wait_for, is_so, what)


def test_a_group_scales_loses_a_replica_and_is_replaced(
    cluster: list[subprocess.Popen[bytes]],
) -> None:
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    args = {
        "max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 2,
        "downscale_delay_s": 30, "imbalance": 2, "router": os.environ.get("RAY_ROUTER", "prefix"),
    }  # fmt: skip
    start = time.monotonic()
    deploy(port, **args)
    print(f"\nserve run until ready: {time.monotonic() - start:.0f} s")
    asyncio.run(ask_once(url))
    asyncio.run(kill_under_load(url, cluster))
    seconds = wait_for(lambda: count_running() == 1, "single replica")
    print(f"3 -> 1 after {seconds:.0f} s without load")
    wait_for(lambda: len(list_ranks(cluster)) == 1, "end of the other ranks", 60)
    serve.shutdown()


def test_another_version_takes_over_and_nothing_is_cut(
    cluster: list[subprocess.Popen[bytes]],
) -> None:
    port = find_free_port()
    deploy(port)
    wait_for(lambda: len(list_ranks(cluster)) == 1, "single rank", 60)
    asyncio.run(update_under_load(f"http://127.0.0.1:{port}", port))
    wait_for(lambda: len(list_ranks(cluster)) == 1, "end of the old rank", 60)


async def ask_once(url: str) -> None:
    """What a client sees is the server's own."""
    async with aiohttp.ClientSession(url) as session:
        async with session.get("/v1/models") as answer:
            assert (await answer.json())["data"][0]["id"] == "demo_model"
        body = {"model": "demo_model", "prompt": "What is AI?", "max_tokens": 4, "top_p": 7}
        async with session.post("/v1/completions", json=body) as answer:
            assert answer.status == 400 and "top_p" in await answer.text()
        body = {"model": "demo_model", "prompt": "What is AI?", "max_tokens": 4, "stream": True}
        async with session.post("/v1/completions", json=body) as answer:
            assert answer.content_type == "text/event-stream"
            lines = [line async for line in answer.content if line.strip()]
        assert lines[-1] == b"data: [DONE]\n"
        assert len([json.loads(line[6:]) for line in lines[:-1]]) >= 2
        async with session.get("/metrics") as answer:
            assert answer.status == 404


async def kill_under_load(url: str, nodes: list[subprocess.Popen[bytes]]) -> None:
    async with loaded(url, num_clients=7, num_streams=1) as load:
        seconds = await wait_here(lambda: count_running() == 3, "three replicas")
        print(f"1 -> 3 after {seconds:.0f} s of load: {load.tell()}")
        assert all(list_ranks([node]) for node in nodes), "a node has no rank"
        await asyncio.sleep(10)
        before = load.num_answered
        for name in list_replicas()[:2]:
            ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
        await wait_here(lambda: count_running() < 3, "loss of a replica")
        seconds = await wait_here(lambda: count_running() == 3, "third replica")
        print(f"two replicas killed, three again after {seconds:.0f} s: {load.tell()}")
        os.kill(list_ranks(nodes)[-1], signal.SIGKILL)
        await wait_here(lambda: count_running() < 3, "loss of a rank")
        seconds = await wait_here(lambda: count_running() == 3, "third replica")
        print(f"kill -9 of a rank, three again after {seconds:.0f} s: {load.tell()}")
        assert load.num_answered > before
    assert not load.losses, load.losses
    assert load.num_retried > 0, "nothing was under way when a replica was killed"
    assert {len(texts) for texts in load.texts.values()} == {1}, "answers differ"


async def update_under_load(url: str, port: int) -> None:
    async with loaded(url, num_clients=1, num_streams=1) as load:
        old = set(list_replicas())
        start = time.monotonic()
        flags = "--low-bit sym_int8 --max-model-len 1024"
        await asyncio.to_thread(deploy, port, server_flags=flags)
        await wait_here(lambda: not old & set(list_replicas()), "end of the old replica")
        print(f"rolling update in {time.monotonic() - start:.0f} s: {load.tell()}")
    assert not load.losses and not load.num_cut, load.tell()


def test_ranks_are_told_who_shares_their_node() -> None:
    seats = [
        Seat("a", "10.0.0.1", ("0",), (5000, 5001)),
        Seat("b", "10.0.0.2", ("3",), (6000, 6001)),
        Seat("a", "10.0.0.1", ("2",), (7000, 7001)),
    ]
    told = tell_ranks(seats)
    assert [one["LOCAL_RANK"] for one in told] == ["0", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in told] == ["2", "1", "2"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["0,2", "3", "0,2"]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in told} == {("10.0.0.1", "5001")}
    assert {one["MASTER_ADDR"] for one in tell_ranks(seats[:1])} == {"127.0.0.1"}


def test_prompts_share_their_beginnings_and_are_never_empty() -> None:
    first = [{"role": "user", "content": "Hello"}]
    told = [
        find_prompt("/v1/chat/completions", json.dumps({"messages": messages}).encode())
        for messages in (first, [*first, {"role": "assistant", "content": "Hi"}])
    ]
    assert told[1].startswith(told[0][:-1])
    for body in (b"", b"nonsense", b"[1]", b"[" * 100_000):
        assert find_prompt("/v1/models", body) == "/v1/models"


@pytest.mark.parametrize(
    "wrong", [{"num_rank": 2}, {"num_ranks": 0}, {"server_flags": "--port=1"}, {"router": "x"}]
)
def test_a_setting_that_is_not_known_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)
