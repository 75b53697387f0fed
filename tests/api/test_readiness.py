"""/ready: proved by real steps, cheap to ask, refused with the cause."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from autotp_serving.api import readiness
from autotp_serving.batch import Batch
from tests.api.service import Service, client
from tests.fakes import letters

Test = Callable[[httpx.AsyncClient, Service], Awaitable[Any]]


def run(test: Test, **options: Any) -> Any:
    async def main() -> Any:
        async with client(**options) as (http, service):
            return await test(http, service)

    return asyncio.run(main())


def hold_steps(service: Service) -> threading.Event:
    """Make every step wait for the event, as if a rank had stopped."""
    gate, forward = threading.Event(), service.runner.forward

    def wait_and_forward(batch: Batch) -> None:
        gate.wait(10)
        forward(batch)

    service.runner.forward = wait_and_forward
    return gate


def test_the_first_probe_runs_a_step_and_those_after_it_do_not():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        for _ in range(20):
            reply = await http.get("/ready")
            assert reply.status_code == 200
            assert reply.json()["status"] == "ready"
            assert 0 <= reply.json()["seconds_since_last_step"] < 5
        assert len(service.runner.batches) == 1
        assert (await http.head("/ready")).status_code == 200

    run(test)


def test_probes_at_the_same_time_share_one_step():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        replies = await asyncio.gather(*(http.get("/ready") for _ in range(20)))
        assert {reply.status_code for reply in replies} == {200}
        assert len(service.runner.batches) == 1

    run(test, delay=0.05)


def test_steps_of_clients_are_proof_enough():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        await http.post("/generate", json={"prompt": "x", "n_predict": 3})
        assert (await http.get("/ready")).status_code == 200
        assert len(service.runner.batches) == 3

    run(test)


def test_ranks_that_are_started_anew_are_not_ready_and_the_server_is_healthy():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        engine = service.engine.engine
        engine.lose("rank 1 has died")
        waits = asyncio.create_task(http.post("/generate", json={"prompt": "x", "n_predict": 3}))
        while (await http.get("/health")).json()["num_waiting"] == 0:
            await asyncio.sleep(0.01)
        assert (await http.get("/health")).json()["status"] == "recovering"
        reply = await http.get("/ready")
        assert reply.status_code == 503
        error = reply.json()["error"]
        assert error["code"] == "recovering" and "rank 1 has died" in error["message"]
        engine.resume(lambda: None)
        assert (await waits).status_code == 200
        assert (await http.get("/ready")).status_code == 200
        assert "autotp:rank_restarts_total" in (await http.get("/metrics")).text

    run(test)


def test_who_comes_when_the_ranks_are_overdue_is_refused():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        engine = service.engine.engine
        engine.lose("rank 1 has died")
        while engine.refusal is None:
            await asyncio.sleep(0.01)
        reply = await http.post("/generate", json={"prompt": "x"})
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert "--recovery-timeout" in reply.text
        engine.resume(lambda: None)
        while engine.outage is not None:
            await asyncio.sleep(0.01)
        assert (await http.post("/generate", json={"prompt": "x"})).status_code == 200

    run(test, config={"recovery_timeout": 0.05})


def test_an_old_step_proves_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.05)

    async def test(http: httpx.AsyncClient, service: Service) -> None:
        for num_steps in (1, 2, 3):
            assert (await http.get("/ready")).status_code == 200
            assert len(service.runner.batches) == num_steps
            await asyncio.sleep(0.06)

    run(test)


def test_a_hung_rank_is_not_ready_until_it_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readiness, "WAIT_SECONDS", 0.1)

    async def test(http: httpx.AsyncClient, service: Service) -> None:
        gate = hold_steps(service)
        for _ in range(5):
            reply = await http.get("/ready")
            assert reply.status_code == 503
            error = reply.json()["error"]
            assert error["code"] == "no_step" and "no step has ended" in error["message"]
        assert service.engine.num_open == 1, "one request, however many probes"
        assert (await http.get("/health")).status_code == 200, "alive it is"
        gate.set()
        monkeypatch.setattr(readiness, "WAIT_SECONDS", 5.0)
        assert (await http.get("/ready")).status_code == 200
        assert len(service.runner.batches) == 1

    run(test)


def test_a_failed_engine_names_its_cause():
    async def test(http: httpx.AsyncClient, _: Service) -> None:
        replies = [await http.get("/ready") for _ in range(2)]
        for reply in replies:
            assert reply.status_code == 503
            assert "rank 1 is gone" in reply.json()["error"]["message"]

    run(test, fail_at_step=0)


def test_a_draining_server_is_not_ready():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        service.engine.is_draining = True
        reply = await http.get("/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")

    run(test)


def test_a_model_gone_mad_is_not_ready_and_is_not_asked_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
):
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        service.runner.next_token = lambda context, sample: -1
        for _ in range(5):
            reply = await http.get("/ready")
            # The step did end on all ranks, but its numbers are no good.
            assert reply.status_code == 503
            assert "NaN" in reply.json()["error"]["message"]
        assert len(service.runner.batches) == 1
        service.runner.next_token = letters
        monkeypatch.setattr(readiness, "RETRY_SECONDS", 0.0)
        assert (await http.get("/ready")).status_code == 200

    run(test)


def test_a_request_that_met_invalid_numbers_takes_the_proof_away(
    caplog: pytest.LogCaptureFixture,
):
    """Its step had run on all ranks, and the one before it was good."""

    async def test(http: httpx.AsyncClient, service: Service) -> None:
        assert (await http.get("/ready")).status_code == 200
        service.runner.next_token = lambda context, sample: -1
        reply = await http.post("/generate", json={"prompt": "x"})
        assert reply.status_code == 500
        assert "invalid numbers" in caplog.text
        assert (await http.get("/ready")).status_code == 503
        service.runner.next_token = letters
        assert (await http.post("/generate", json={"prompt": "x"})).status_code == 200
        assert (await http.get("/ready")).status_code in (200, 503), "the last probe was refused"
        await asyncio.sleep(readiness.RETRY_SECONDS)
        assert (await http.get("/ready")).status_code == 200

    run(test)


def test_probes_do_not_count_as_latencies_and_leave_nothing():
    async def test(http: httpx.AsyncClient, service: Service) -> None:
        await http.get("/ready")
        assert service.engine.num_open == 0
        assert service.engine.engine.stats().num_held_blocks == 0
        assert sum(service.engine.latencies.time_to_first_token.counts) == 0

    run(test)
