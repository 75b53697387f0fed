"""The HTTP client: responses cut anywhere, every way to end, every way to fail."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.http_client import HttpClient, HttpFailure, Response

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
    b'7\r\n{"a":1}\r\n1\r\n\n\r\na;ext=1\r\n{"b": 234}\r\n0\r\n\r\n'
)
SIZED = b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\nhello"
UNSIZED = b"HTTP/1.1 200 OK\r\n\r\nuntil the end"


async def serve_parts(parts, *, close=True, pause=0.0):
    """A server that answers every request with the given packets; counts its connections."""
    connections = []

    async def handle(reader, writer):
        connections.append(writer)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause)
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections


def fetch(parts, *, close=True, pause=0.0, **options) -> Response:
    async def run():
        server, url, _ = await serve_parts(parts, close=close, pause=pause)
        async with server:
            return await HttpClient(url, **options).get("/x")

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("whole", "status", "body"),
    [
        (CHUNKED, 200, b'{"a":1}\n{"b": 234}'),
        (SIZED, 503, b"hello"),
        (UNSIZED, 200, b"until the end"),
    ],
)
def test_a_response_may_arrive_cut_anywhere(whole, status, body):
    async def run():
        for cut in range(1, len(whole)):
            server, url, _ = await serve_parts([whole[:cut], whole[cut:]], pause=0.0005)
            async with server:
                response = await HttpClient(url).get("/x")
            assert (response.status, response.body) == (status, body), cut

    asyncio.run(run())


def test_byte_by_byte():
    parts = [CHUNKED[i : i + 1] for i in range(len(CHUNKED))]
    assert fetch(parts).body == b'{"a":1}\n{"b": 234}'


def test_pieces_carry_their_own_times():
    head, tail = CHUNKED[:-26], CHUNKED[-26:]
    response = fetch([head, tail], pause=0.1)
    times = [time for time, _ in response.pieces]
    assert times[-1] - times[0] >= 0.09
    assert response.finished >= times[-1]


def test_connections_are_kept_while_they_are_fresh():
    async def run():
        server, url, connections = await serve_parts([CHUNKED], close=False)
        async with server:
            client = HttpClient(url)
            for _ in range(3):
                await client.get("/x")
            assert len(connections) == 1
            client.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([], "connection closed before the response"),
        ([CHUNKED[:70]], "connection closed in mid-response"),
        ([SIZED[:-2]], "connection closed in mid-response"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "the response is not HTTP"),
    ],
)
def test_broken_responses_are_failures_of_a_kind(parts, kind):
    with pytest.raises(HttpFailure, match=kind):
        fetch(parts)


def test_a_stall_is_noticed_but_slow_bytes_are_not():
    with pytest.raises(HttpFailure, match=r"stalled: nothing arrived for 0\.2 s"):
        fetch([CHUNKED[:70]], pause=5, stall_timeout=0.2)
    parts = [CHUNKED[:70], CHUNKED[70:75], CHUNKED[75:80], CHUNKED[80:]]
    assert fetch(parts, pause=0.15, stall_timeout=0.3).status == 200


def test_the_whole_request_has_a_limit():
    parts = [UNSIZED, *[b"x"] * 100]
    start = time.perf_counter()
    with pytest.raises(HttpFailure, match=r"not finished after 0\.3 s"):
        fetch(parts, pause=0.05, timeout=0.3)
    assert time.perf_counter() - start < 2


def test_nobody_listens():
    with pytest.raises(HttpFailure, match="cannot connect: connection refused"):
        asyncio.run(HttpClient("http://127.0.0.1:9").get("/"))


def test_urls():
    assert HttpClient("localhost:8000").url == "http://localhost:8000"
    assert HttpClient("http://h/base/").url == "http://h/base"
    with pytest.raises(ValueError, match="is not a URL"):
        HttpClient("ftp://h")
