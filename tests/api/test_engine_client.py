"""The bridge alone, with an engine that only takes notes: hops, order, release in every phase."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from autotp_serving.api import streaming_response
from autotp_serving.api.engine_client import EngineClient, Usage
from autotp_serving.api.errors import ApiError
from autotp_serving.engine import EngineError, QueueFullError
from autotp_serving.request import Request, RequestOutput, SamplingParams
from tests.api import service


class NotingEngine:
    """Notes what it is asked; refuses to take more than `room` requests."""

    def __init__(self, room: int = 100) -> None:
        self.failure: str | None = None
        self.refusal: str | None = None
        self.room = room
        self.submitted: list[str] = []
        self.aborted: list[str] = []

    def submit(self, request: Request) -> None:
        if len(self.submitted) >= self.room:
            raise QueueFullError("full")
        self.submitted.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def bridge(room: int = 100) -> tuple[EngineClient, NotingEngine]:
    noting = NotingEngine(room)
    engine = EngineClient(lambda sink: noting)
    engine.bind(asyncio.get_running_loop())
    return engine, noting


def requests(*names: str) -> list[Request]:
    return [Request(name, (1, 2), SamplingParams(), 0.0) for name in names]


def output(name: str, text: str, reason: Any = None) -> RequestOutput:
    return RequestOutput(name, text, (5,), reason)


def from_thread(engine: EngineClient, *steps: list[RequestOutput]) -> None:
    thread = threading.Thread(target=lambda: [engine.deliver(step) for step in steps])
    thread.start()
    thread.join()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 5.0))


def test_outputs_arrive_in_order_and_the_stream_ends() -> None:
    async def go() -> None:
        engine, noting = bridge()
        usage = Usage(num_prompt_tokens=2)
        with engine.open(requests("a", "b"), usage) as stream:
            from_thread(
                engine,
                [output("a", "1"), output("b", "2")],
                [output("a", "3", "stop")],
                [output("b", "4", "length")],
            )
            texts = [out.text async for outputs in stream for out in outputs]
        assert texts == ["1", "2", "3", "4"]
        assert usage == Usage(num_prompt_tokens=2, num_output_tokens=4)
        assert noting.aborted == [] and engine.num_open == 0

    run(go())


def test_one_hop_per_step_whatever_its_size() -> None:
    async def go() -> None:
        engine, _ = bridge()
        hops = []
        loop = asyncio.get_running_loop()
        hop = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (hops.append(args), hop(*args))
        names = [f"r{i}" for i in range(50)]
        with engine.open(requests(*names), Usage()) as stream:
            from_thread(engine, [output(name, "x", "stop") for name in names])
            assert sum([len(outputs) async for outputs in stream]) == 50
        assert len(hops) == 1

    run(go())


def test_a_slow_reader_gets_what_has_piled_up_in_one_piece() -> None:
    async def go() -> None:
        engine, _ = bridge()
        with engine.open(requests("a"), Usage()) as stream:
            from_thread(engine, *([output("a", "x")] for _ in range(10)))
            await asyncio.sleep(0.01)
            assert len(await anext(stream)) == 10
            from_thread(engine, [output("a", "x", "stop")])
            assert [len(outputs) async for outputs in stream] == [1]

    run(go())


@pytest.mark.parametrize("num_read", [0, 1])
def test_cancelling_the_reader_aborts(num_read: int) -> None:
    async def go() -> None:
        engine, noting = bridge()

        async def read() -> None:
            with engine.open(requests("a", "b"), Usage()) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        for _ in range(num_read):
            from_thread(engine, [output("a", "x", "stop"), output("b", "x")])
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(noting.aborted) == (["b"] if num_read else ["a", "b"])
        assert engine.num_open == 0
        from_thread(engine, [output("b", "late"), output("b", "", "abort")])
        await asyncio.sleep(0.01)

    run(go())


def test_an_error_in_the_reader_aborts() -> None:
    async def go() -> None:
        engine, noting = bridge()
        with pytest.raises(LookupError), engine.open(requests("a"), Usage()):
            raise LookupError
        assert noting.aborted == ["a"]

    run(go())


def test_a_full_queue_takes_none_of_several() -> None:
    async def go() -> None:
        engine, noting = bridge(room=2)
        with pytest.raises(ApiError) as caught, engine.open(requests("a", "b", "c"), Usage()):
            raise AssertionError("must not open")
        assert caught.value.status == 503 and int(caught.value.headers["Retry-After"]) >= 1
        assert {"a", "b"} <= set(noting.aborted) and engine.num_open == 0

    run(go())


def test_retry_after_follows_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle hour before a rush once counted as if the engine had been slow for an hour."""

    async def go() -> None:
        engine, _ = bridge()
        now = [100.0]
        monkeypatch.setattr("autotp_serving.api.engine_client.time.monotonic", lambda: now[0])
        for expected in (1, 8):
            now[0] += 3600.0
            names = [f"r{i}" for i in range(10)]
            with engine.open(requests(*names, "last"), Usage()):
                assert engine.seconds_until_room() == expected  # the pace of before, if any
                if expected == 1:
                    now[0] += 5.0
                    assert engine.seconds_until_room() == 5  # nothing is known yet
                    now[0] -= 5.0
                for name in names:
                    now[0] += 8.0
                    engine._dispatch([output(name, "x", "stop")])  # after 1 token of 32
                assert engine.seconds_until_room() == 8
                now[0] += 1e6
                assert engine.seconds_until_room() == 600
                now[0] -= 1e6

    run(go())


@pytest.mark.parametrize("num_finishes", [1, 3, 7])
@pytest.mark.parametrize("length", [100, 400])
def test_retry_after_is_what_it_will_take(
    length: int, num_finishes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time, each 100 or 400 tokens of the 400 it may have, 20 a second."""

    async def go() -> None:
        engine, _ = bridge()
        now = [100.0]
        monkeypatch.setattr("autotp_serving.api.engine_client.time.monotonic", lambda: now[0])
        params = SamplingParams(max_tokens=400)
        names = [f"r{i}" for i in range(30)]
        waiting = list(names)
        running: dict[str, int] = {}
        foretold: dict[int, float] = {}
        ends: list[float] = []

        def step() -> None:
            now[0] += 0.05
            while waiting and len(running) < 3:
                running[waiting.pop(0)] = 0
            outputs = []
            for name in list(running):
                running[name] += 1
                is_last = running[name] == length
                outputs.append(output(name, "x", "stop" if is_last else None))
                if is_last:
                    del running[name]
                    ends.append(now[0])
            engine._dispatch(outputs)

        with engine.open([Request(name, (1, 2), params, 0.0) for name in names], Usage()):
            while len(ends) < 6 + num_finishes:
                step()
                if len(ends) == 6 and not foretold:
                    foretold[0] = now[0] + engine.seconds_until_room(num_finishes)
        took = ends[5 + num_finishes] - ends[5]
        said = foretold[0] - ends[5]
        assert took / 2 <= said <= 2 * took + 1

    run(go())


def test_a_stopped_or_failed_engine_is_503() -> None:
    async def go() -> None:
        engine, noting = bridge()
        noting.failure = "the engine failed: rank 1 is gone"
        with pytest.raises(ApiError, match="rank 1 is gone"), engine.open(requests("a"), Usage()):
            raise AssertionError("must not open")
        noting.failure = None

        def refuse(request: Request) -> None:
            raise EngineError("the server is shutting down")

        noting.submit = refuse
        with pytest.raises(ApiError, match="shutting down"), engine.open(requests("a"), Usage()):
            raise AssertionError("must not open")
        assert engine.num_open == 0

    run(go())


def test_drain_waits_then_ends_the_rest() -> None:
    async def go() -> None:
        engine, noting = bridge()
        await engine.drain(0.0)
        engine.is_draining = False
        with engine.open(requests("a", "b"), Usage()) as stream:
            task = asyncio.create_task(engine.drain(0.05))
            from_thread(engine, [output("a", "x", "stop")])
            outputs = [out async for outputs in stream for out in outputs]
            await task
        assert [out.finish_reason for out in outputs] == ["stop", "error"]
        assert outputs[-1].error == "the server is shutting down"
        assert noting.aborted == ["b"]

    run(go())


def test_outputs_after_the_loop_has_gone_are_dropped() -> None:
    async def go() -> EngineClient:
        return bridge()[0]

    engine = asyncio.run(go())
    engine.deliver([output("a", "x")])


@pytest.mark.parametrize("num_taken", [1, 3, 6])  # of six pieces, the last of which only ends
def test_a_client_that_stops_reading_is_let_go(
    monkeypatch: pytest.MonkeyPatch, num_taken: int
) -> None:
    """Its connection is open and full: nothing else would ever end its request."""
    monkeypatch.setattr(streaming_response, "PATIENCE_SECONDS", 0.05)
    body = b'{"prompt": "What is AI?", "n_predict": 4, "ignore_eos": true}'
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/generate_stream",
        "raw_path": b"/generate_stream", "query_string": b"", "headers": [], "root_path": "",
    }  # fmt: skip
    taken = []
    received = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        return received.pop() if received else await asyncio.Event().wait()

    async def send(message: dict[str, Any]) -> None:
        if len(taken) == num_taken:
            await asyncio.Event().wait()
        taken.append(message)

    async def go() -> None:
        async with service.client() as (_, one):
            await asyncio.wait_for(one.app(scope | {"app": one.app}, receive, send), 20)
            assert one.engine.num_open == 0

    asyncio.run(go())
    assert len(taken) <= num_taken
