"""Connections and what is said on them: raw sockets against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import re
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from autotp_serving.api import http_protocol
from autotp_serving.api.connections import WAIT_SECONDS, Acceptor, Place, Places
from autotp_serving.api.http_protocol import HttpProtocol
from tests.api.conftest import LiveServer

pytestmark = pytest.mark.live

SECONDS = 1.0  # that a connection may wait, and a body take, where a test is about that
NUM_FILES = 110
ASK = {"prompt": "What is AI?", "n_predict": 8}
SLOW = {"prompt": "x", "n_predict": 300, "ignore_eos": True}


def connect(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=20)


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    while part := client.recv(2**16):
        parts.append(part)
    return b"".join(parts)


def request(body: dict[str, Any] | bytes, *lines: str, path: str = "/generate") -> bytes:
    """A whole POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *lines, "", ""]
    return "\r\n".join(head).encode() + data


def parse(answer: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each completion in a row, interim ones left out."""
    found = []
    while answer:
        head, _, answer = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 100:
            continue
        length = re.search(rb"content-length: (\d+)", head.lower())
        body = b""
        if length is not None:
            body, answer = answer[: int(length[1])], answer[int(length[1]) :]
        elif b"chunked" in head:
            while True:
                size, _, answer = answer.partition(b"\r\n")
                body += answer[: int(size, 16)]
                answer = answer[int(size, 16) + 2 :]
                if int(size, 16) == 0:
                    break
        else:
            body, answer = answer, b""
        found.append((status, body))
    return found


def ask(server: LiveServer, data: bytes, *, ends: bool = False) -> list[tuple[int, bytes]]:
    """Send and read up to the connection's end."""
    with connect(server) as client:
        client.sendall(data)
        if ends:
            client.shutdown(socket.SHUT_WR)
        return parse(read_all(client))


def message_of(body: bytes) -> str:
    return json.loads(body)["error"]["message"]


def count_sockets(server: LiveServer) -> int:
    """That the process has open."""
    found = 0
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found += os.readlink(link).startswith("socket:")
    return found


# Time


@pytest.fixture(scope="module")
def hasty() -> Iterator[LiveServer]:
    """A server with little patience and few files."""
    options = {"seconds": SECONDS, "files": NUM_FILES, "delay": 0.01, "max_model_len": 4096}
    server = LiveServer(options | {"config": {"port": 0}})
    yield server
    server.stop()


def test_patience_is_short_enough_to_matter_and_long_enough_to_connect() -> None:
    assert 5.0 <= WAIT_SECONDS <= 60.0


@pytest.mark.parametrize("start", [b"", b"POST /gen", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(hasty: LiveServer, start: bytes) -> None:
    """A byte now and then prolongs nothing."""
    began = time.monotonic()
    with connect(hasty) as client:
        client.sendall(start)
        client.settimeout(0.2)
        answer = b""
        while time.monotonic() - began < 5 * SECONDS:
            try:
                if not (part := client.recv(1000)):
                    break
                answer += part
            except TimeoutError:
                if start:
                    client.sendall(b"X")
        else:
            raise AssertionError("still open")
    assert time.monotonic() - began > SECONDS * 0.8
    if start:
        [(status, body)] = parse(answer)
        assert status == 408 and "head" in message_of(body)
    else:
        assert answer == b""


def test_the_second_head_on_a_connection_has_to_come_as_well(hasty: LiveServer) -> None:
    with connect(hasty) as client:
        client.sendall(request(ASK))
        time.sleep(0.5)
        client.sendall(b"POST /generate HTTP/1.1\r\n")
        answers = parse(read_all(client))
    assert [status for status, _ in answers] == [200, 408]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/nowhere"])
def test_half_a_body_is_not_waited_for(hasty: LiveServer, path: str) -> None:
    began = time.monotonic()
    [(status, body)] = ask(hasty, request(ASK, path=path)[:-10])
    assert status == 408 and "too slowly" in message_of(body)
    assert time.monotonic() - began < 5 * SECONDS
    hasty.wait_for_line(f"POST {path} 408")


def test_a_body_that_keeps_coming_may_take_longer(hasty: LiveServer) -> None:
    data = request({"prompt": "a" * 200_000}, "Connection: close", path="/tokenize")
    with connect(hasty) as client:
        began = time.monotonic()
        for start in range(0, len(data), 10_000):
            client.sendall(data[start : start + 10_000])
            time.sleep(0.1)
        assert time.monotonic() - began > 1.5 * SECONDS
        [(status, _)] = parse(read_all(client))
    assert status == 200


def test_a_long_answer_is_no_waiting(hasty: LiveServer) -> None:
    body = SLOW | {"n_predict": 200}
    [(status, _)] = ask(hasty, request(body, "Connection: close"))
    assert status == 200


def test_a_client_that_reads_nothing_is_given_up(hasty: LiveServer) -> None:
    before = count_sockets(hasty)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", httpx.URL(hasty.url).port))
        client.settimeout(1.0)
        with contextlib.suppress(OSError):  # it is full, or closed already
            for _ in range(2000):
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        began = time.monotonic()
        while count_sockets(hasty) > before:
            assert time.monotonic() - began < 10 * SECONDS, "still held"
            time.sleep(0.1)


# Number


def test_probes_and_others_get_through_a_crowd_that_says_nothing(hasty: LiveServer) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(hasty)) for _ in range(3 * NUM_FILES)]
        for path in ("/health", "/ready", "/health"):
            began = time.monotonic()
            assert httpx.get(f"{hasty.url}{path}").status_code == 200
            assert time.monotonic() - began < 1.0
        assert httpx.post(f"{hasty.url}/generate", json=ASK).status_code == 200
        [(status, body)] = parse(read_all(silent[0]))  # made room for one of the others
        assert status == 503 and json.loads(body)["error"]["code"] == "too_many_connections"
    assert sum("file descriptors" in line for line in hasty.lines) == 1


@pytest.mark.parametrize("is_silent", [True, False])
def test_crowds_that_come_and_go_leave_nothing_behind(
    start_server: Callable[..., LiveServer], is_silent: bool
) -> None:
    """Those too that give way before they are quite in."""
    server = start_server(files=52)  # so few that the newest of them give way to one another
    before = count_sockets(server)
    for _ in range(10):
        with ExitStack() as stack:
            for _ in range(NUM_FILES):
                client = stack.enter_context(connect(server))
                if not is_silent:
                    client.sendall(request(ASK))
    deadline = time.monotonic() + 10.0
    while count_sockets(server) > before:
        assert time.monotonic() < deadline, count_sockets(server) - before
        time.sleep(0.05)
    server.signal(signal.SIGTERM)
    assert server.wait(10.0) == 0
    assert not any("Cancel" in line or "Traceback" in line for line in server.lines)


def test_where_all_places_are_at_work_probes_are_answered_and_others_refused(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(files=NUM_FILES, delay=0.02, max_model_len=4096)
    body = request(SLOW | {"n_predict": 4000}, path="/generate_stream")
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(NUM_FILES)]
        for client in clients:
            client.sendall(body)
        heads = [client.recv(15) for client in clients]  # each is in, or refused
        assert set(heads) == {b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Se"}
        assert heads.count(b"HTTP/1.1 200 OK") > NUM_FILES // 2
        refused = httpx.post(f"{server.url}/generate", json=ASK)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert httpx.get(f"{server.url}/ready").status_code == 200
    server.wait_for_health(lambda health: health["num_running"] == 0, 10.0)
    assert httpx.post(f"{server.url}/generate", json=ASK).status_code == 200
    assert not any("Traceback" in line for line in server.lines)


def test_who_has_waited_longest_makes_room() -> None:
    now = 0.0
    places = Places(2, lambda: now, num_spare=1)
    gone = []
    first, second = places.take(), places.take()
    for place, name in ((first, "first"), (second, "second")):
        place.give_way = place.expire = lambda name=name: gone.append(name)
    first.work()
    third = places.take()  # second's place
    assert gone == ["second"] and not third.is_spare
    third.work()
    spare = places.take()
    assert spare.is_spare and len(places.taken) == 3
    spare.work()
    assert places.take() is None
    first.wait()
    assert not places.take().is_spare and gone == ["second", "first"]
    spare.leave()
    spare.leave()
    assert len(places.taken) == 2
    now = WAIT_SECONDS + 1.0
    places.expire()
    assert not places.waiting


def test_a_machine_without_files_left_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """Rather than at once and for ever, as long as a connection waits to be taken in."""

    class Full:
        """A listening socket whose machine is out of files, once."""

        def __init__(self, sock: socket.socket) -> None:
            self.num_asked = 0
            self._sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

        def accept(self) -> Any:
            self.num_asked += 1
            if self.num_asked == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return self._sock.accept()

    async def go() -> None:
        made: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()

        class Greeter(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport)

        with socket.create_server(("127.0.0.1", 0)) as sock:
            full = Full(sock)
            places = Places(2, asyncio.get_running_loop().time)
            acceptor = Acceptor(full, places, lambda place: Greeter(), None)
            with socket.create_connection(sock.getsockname()):
                transport = await asyncio.wait_for(made, 5.0)
            assert full.num_asked <= 4
            transport.close()
            acceptor.close()
            await acceptor.wait_closed()

    asyncio.run(go())
    assert "Too many open files" in caplog.text


def test_a_connection_leaves_nothing_for_the_collector() -> None:
    """Which comes late, since it costs every stream a pause."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    async def go() -> None:
        config = uvicorn.Config(app, http=HttpProtocol, lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        protocols = []

        def make(place: Place) -> HttpProtocol:
            protocol = HttpProtocol(place=place, config=config, server_state=state, app_state={})
            protocols.append(weakref.ref(protocol))
            return protocol

        with socket.create_server(("127.0.0.1", 0)) as sock:
            places = Places(2, asyncio.get_running_loop().time)
            acceptor = Acceptor(sock, places, make, None)
            for lines in (b"", b"Connection: close\r\n"):
                reader, writer = await asyncio.open_connection(*sock.getsockname())
                writer.write(b"GET / HTTP/1.1\r\n" + lines + b"\r\n")
                assert b"here" in await reader.readuntil(b"0\r\n\r\n")
                writer.close()
            acceptor.close()
            while state.connections or state.tasks:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not places.taken and not places.waiting
        assert [protocol() for protocol in protocols] == [None, None]

    gc.collect()
    gc.disable()
    try:
        asyncio.run(go())
    finally:
        gc.enable()


# What is left out by uvicorn


@pytest.mark.parametrize(
    "lines",
    [
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        ("Upgrade: h2c", "Connection: close, upgrade"),
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        ("Connection: upgrade", "Upgrade: TLS/1.0"),
    ],
)  # fmt: skip
def test_an_upgrade_is_ignored_and_the_body_is_read(
    live: LiveServer, lines: tuple[str, ...]
) -> None:
    plain = request(ASK, "Connection: close")
    assert {status for status, _ in ask(live, request(ASK, *lines) + plain)} == {200}
    with connect(live) as client:  # the body comes later
        data = request(ASK, *lines)
        client.sendall(data[:-20])
        time.sleep(0.1)
        client.sendall(data[-20:])
        time.sleep(0.1)
        client.sendall(plain)
        answers = parse(read_all(client))
    assert json.loads(answers[0][1])["message"]["content"] == "a branch"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(json.dumps(ASK)), json.dumps(ASK).encode())
    head = ["POST /generate HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *lines, "", ""]
    answers = ask(live, "\r\n".join(head).encode() + chunks + plain)
    assert json.loads(answers[0][1])["message"]["content"] == "a branch"


def test_curl_asks_for_http2_and_gets_an_answer(live: LiveServer) -> None:
    command = ["curl", "-s", "--http2", "-d", json.dumps(ASK), f"{live.url}/generate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert json.loads(done.stdout)["message"]["content"] == "a branch"
    assert not any("upgrade" in line.lower() for line in live.lines)


def test_no_tunnel_is_opened(live: LiveServer) -> None:
    [(status, body)] = ask(live, b"CONNECT example.org:80 HTTP/1.1\r\nHost: example.org:80\r\n\r\n")
    assert status == 405 and "CONNECT" in message_of(body)


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_http_1_0_gets_no_chunks(live: LiveServer, path: str) -> None:
    body = {"prompt": "What is AI?", "stream": True} if path.startswith("/v1") else ASK
    data = request(body, path=path).replace(b"HTTP/1.1", b"HTTP/1.0")
    with connect(live) as client:
        client.sendall(data)
        answer = read_all(client)
    assert b"transfer-encoding" not in answer.lower() and b"connection: close" in answer
    [(status, lines)] = parse(answer)
    assert status == 200
    for line in filter(None, lines.split(b"\n")):
        if line != b"data: [DONE]":
            json.loads(line.removeprefix(b"data: "))


def test_http_1_0_knows_the_length_of_a_whole_answer(live: LiveServer) -> None:
    for method in (b"GET", b"HEAD"):
        with connect(live) as client:
            client.sendall(method + b" /health HTTP/1.0\r\n\r\n")
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 200") and b"content-length" in answer
        assert answer.endswith(b"}") == (method == b"GET")


# Half-closed


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("body", [ASK, SLOW])
def test_a_client_that_has_finished_sending_is_answered(
    live: LiveServer, path: str, body: dict[str, Any]
) -> None:
    """Also one that waits for longer than the server believes it to be there without a sign."""
    [(status, answer)] = ask(live, request(body, path=path), ends=True)
    assert status == 200
    last = json.loads(answer.splitlines()[-1])
    assert last["finish_reason"] == "length"
    if path == "/generate_stream":
        assert last["index"] == body["n_predict"] == len(answer.splitlines()) - 1


def test_it_is_answered_from_the_queue_too(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(delay=0.01, config={"max_num_seqs": 1})
    with connect(server) as first, connect(server) as second:
        first.sendall(request(SLOW | {"n_predict": 100}, path="/generate_stream"))
        server.wait_for_health(lambda health: health["num_running"] == 1)
        second.sendall(request(ASK, path="/generate_stream"))
        server.wait_for_health(lambda health: health["num_waiting"] == 1)
        second.shutdown(socket.SHUT_WR)
        [(status, answer)] = parse(read_all(second))
    assert status == 200 and len(answer.splitlines()) == ASK["n_predict"] + 1


def test_all_requests_of_a_row_are_answered_before_the_end(live: LiveServer) -> None:
    answers = ask(live, request(ASK) * 3, ends=True)
    assert [status for status, _ in answers] == [200] * 3


def test_half_a_request_is_no_request(live: LiveServer) -> None:
    for data in (b"", b"GET /health HTT", request(ASK)[:-5]):
        assert ask(live, data, ends=True) == []


def test_an_old_client_that_has_finished_sending_is_answered(live: LiveServer) -> None:
    data = request(SLOW).replace(b"HTTP/1.1", b"HTTP/1.0")
    [(status, _)] = ask(live, data, ends=True)
    assert status == 200


# Refusals


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, GZIP", "x"])
def test_packed_bodies_are_refused_in_words(live: LiveServer, encoding: str) -> None:
    """However long they are: who is still sending can read why."""
    for size in (10, 3_000_000):
        data = request(b"\x1f\x8b" + b"\0" * size, f"Content-Encoding: {encoding}")
        [(status, body)] = ask(live, data)
        assert status == 415 and "send it as it is" in message_of(body)


def test_an_encoding_that_is_none_is_served(live: LiveServer) -> None:
    [(status, _)] = ask(live, request(ASK, "Content-Encoding: identity", "Connection: close"))
    assert status == 200


def test_too_large_a_body_is_refused_while_it_comes(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(config={"max_body_size": 1000})
    [(status, body)] = ask(server, request(b"x" * 3_000_000))
    assert status == 413 and "--max-body-size" in message_of(body)


def test_who_sends_slowly_what_is_refused_can_still_read_why(
    start_server: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than a client that sends nothing is waited for."""
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 1.0)
    server = start_server(config={"max_body_size": 1000})
    data = request(b"x" * 100_000)
    with connect(server) as client:
        for start in range(0, len(data), len(data) // 8):
            client.sendall(data[start : start + len(data) // 8])
            time.sleep(1.4 / 7)
        [(status, _)] = parse(read_all(client))
    assert status == 413


def test_rubbish_after_a_request_does_not_spoil_its_answer(live: LiveServer) -> None:
    for rubbish in (b"\0\0\0\r\n\r\n", b"NONSENSE\r\n\r\n", request(ASK) + b"\xff\xff\r\n\r\n"):
        answers = ask(live, request(SLOW, path="/generate_stream") + rubbish)
        assert {status for status, _ in answers} == {200}
        assert len(answers) == (2 if rubbish.startswith(b"POST") else 1)
        assert json.loads(answers[0][1].splitlines()[-1])["finish_reason"] == "length"


def test_rubbish_alone_is_refused_in_our_one_shape(live: LiveServer) -> None:
    [(status, body)] = ask(live, b"NONSENSE\r\n\r\n")
    assert status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error"


def test_head_is_answered_wherever_get_is(live: LiveServer) -> None:
    paths = httpx.get(f"{live.url}/openapi.json").json()["paths"]
    found = [path for path, methods in paths.items() if "get" in methods]
    for path in [*found, "/", "/docs", "/openapi.json", "/v1/models/letters"]:
        path = path.replace("{name}", "letters")
        whole, head = httpx.get(f"{live.url}{path}"), httpx.head(f"{live.url}{path}")
        assert (head.status_code, head.content) == (whole.status_code, b"") == (200, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert "content-length" in head.headers
    assert len(found) >= 6
    assert httpx.head(f"{live.url}/generate").status_code == 405
