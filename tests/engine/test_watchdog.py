"""Steps that do not end are noticed, others are left alone."""

from __future__ import annotations

import threading
import time

import pytest

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.engine import watchdog
from autotp_serving.engine.watchdog import FIRST_SECONDS, FIRST_STEPS, StepLimits, StepWatchdog
from tests.engine.test_engine import Bench, wait_for
from tests.fakes import FakeRunner


def taught(*steps: tuple[int, float], step_timeout: float = 5.0) -> StepLimits:
    """Limits after the first steps, which teach nothing, and these."""
    limits = StepLimits(step_timeout)
    for num_tokens, seconds in ((4096, 90.0),) * FIRST_STEPS + steps:
        limits.learn(num_tokens, seconds)
    return limits


def test_the_first_steps_may_compile() -> None:
    limits = StepLimits(5.0)
    for _ in range(FIRST_STEPS):
        assert limits.find(1) == FIRST_SECONDS
        limits.learn(1, 90.0)
    assert limits.find(1) == 5.0
    assert StepLimits(9000.0).find(1) == 9000.0


def test_a_step_gets_many_times_what_its_like_took_where_that_is_more() -> None:
    assert taught((8, 0.03)).find(8) == 5.0
    assert taught((8, 2.0)).find(9) == pytest.approx(20.0)
    assert taught((4096, 30.0)).find(8) == pytest.approx(300.0)  # nothing smaller is known


def test_a_step_larger_than_any_before_is_expected_to_take_longer() -> None:
    limits = taught((8, 0.1))
    assert limits.find(4096) == pytest.approx(10 * 0.1 * 512)
    limits.learn(4096, 2.0)
    assert limits.find(4096) == pytest.approx(20.0)
    assert limits.find(8) == 5.0


def test_a_slow_step_is_forgotten_in_time() -> None:
    limits = taught((8, 60.0))
    assert limits.find(8) > 500
    for _ in range(600):
        limits.learn(8, 0.05)
    assert limits.find(8) == 5.0


class Watch:
    """A watchdog of steps that may take a fifth of a second, and what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watchdog, "FIRST_STEPS", 0)
        self.stalls: list[float] = []
        self.stalled = threading.Event()
        self.dog = StepWatchdog(0.2, self._note)
        self.dog.start()

    def _note(self, limit: float) -> None:
        self.stalls.append(limit)
        self.stalled.set()


def test_a_step_that_does_not_end_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    for _ in range(50):  # many short ones first, over more than the limit
        watch.dog.begin(1)
        time.sleep(0.01)
        watch.dog.end()
    assert not watch.stalls
    started = time.monotonic()
    watch.dog.begin(1)
    assert watch.stalled.wait(5.0)
    assert 0.19 < time.monotonic() - started < 1.5
    time.sleep(0.3)
    assert watch.stalls == [0.2]


def test_a_step_after_a_long_first_one_is_not_measured_by_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    monkeypatch.setattr(watchdog, "FIRST_STEPS", 1)
    watch.dog.begin(1)
    time.sleep(0.3)
    watch.dog.end()
    watch.dog.begin(1)
    assert watch.stalled.wait(3.0)


def test_idle_time_is_no_stall_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    watch.dog.begin(1)
    watch.dog.end()
    before = time.process_time()
    assert not watch.stalled.wait(0.6)
    assert time.process_time() - before < 0.05
    watch.dog.stop()
    watch.dog.stop()
    watch.dog._thread.join(2.0)
    assert not watch.dog._thread.is_alive()


class Stuck(FakeRunner):
    """Its fifth step waits for the test when it is begun."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def forward(self, batch):
        if len(self.batches) == 4:
            self.released.wait(20)
        super().forward(batch)


def test_an_engine_whose_step_hangs_fails_with_who_is_late(max_in_flight: int) -> None:
    runner = Stuck()
    bench = Bench(runner, step_timeout=1.0)
    bench.engine._find_late_ranks = lambda: "rank 3 has not reported"
    bench.engine.start()
    bench.submit("a", max_tokens=50)
    wait_for(lambda: bench.engine.failure is not None)
    oldest = 5 - max_in_flight  # of those begun and not collected
    assert bench.engine.failure == (
        f"the engine failed: step {oldest} has not ended within 1 s: rank 3 has not reported"
    )
    runner.released.set()
    assert bench.engine.shutdown()


def test_the_least_timeout_leaves_a_busy_machine_time() -> None:
    with pytest.raises(ConfigError, match=r"--step-timeout must be at least 1, not 0\.5"):
        ServingConfig(model_path="fake", step_timeout=0.5)
