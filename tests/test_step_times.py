"""Totals of a rank: they add up, and survive the wire."""

from __future__ import annotations

from autotp_serving.step_times import LAYOUT, RankTimes, StepTimes


def test_totals_add_up_and_survive_the_wire():
    times = StepTimes()
    assert times.snapshot() == RankTimes()
    for _ in range(3):
        times.add_step(0.5)
        times.add_collective(2**40, 0.25)
    expected = RankTimes(3, 1.5, 3, 3 * 2**40, 0.75)
    assert times.snapshot() == expected
    data = expected.to_bytes()
    assert len(data) == LAYOUT.size
    assert RankTimes.from_bytes(data) == expected
