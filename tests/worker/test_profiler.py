"""--profile: who is charged for what, and that everything is as before afterwards."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autotp_serving.batch import Batch
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.step_times import StepTimes
from autotp_serving.worker import profiler as worker_profiler
from autotp_serving.worker.profiler import PARTS, PartClock, StepProfiler
from autotp_serving.worker.runner import ModelRunner
from autotp_serving.worker.step_logits import StepLogits


def make_batch(*query_lens: int) -> Batch:
    num_seqs = len(query_lens)
    return Batch(list(range(num_seqs)), [0] * num_seqs, list(query_lens), list(query_lens), [])


def test_inner_parts_count_for_themselves_alone(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(worker_profiler.time, "perf_counter", lambda: next(moments))
    clock = PartClock(lambda: None)
    clock.enter("pass")
    clock.enter("linears")
    clock.leave()
    clock.move("collectives", 0.25)
    clock.leave()
    assert clock.seconds == {"pass": 1.75, "linears": 2.0, "collectives": 0.25}


def test_a_part_within_itself_is_one_call():
    clock = PartClock(lambda: None)
    clock.enter("linears")
    clock.enter("linears")
    clock.leave()
    clock.leave()
    assert clock.calls == {"linears": 1}


@pytest.fixture
def watched(tmp_path):
    """A runner whose pass takes 2 ms, 1 ms of it in a dense linear layer, and its profiler."""
    model = nn.Sequential(nn.Linear(4, 4))
    slow = model[0].forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.001)
        return slow(x)

    model[0].forward = forward
    times = StepTimes()

    class SlowForward:
        def find_padded_size(self, batch: Batch) -> int:
            return 0

        def __call__(self, inputs: Batch) -> torch.Tensor:
            times.add_collective(8, 0.0)
            time.sleep(0.001)
            return model(torch.zeros(1, 4))

    state = SimpleNamespace(apply=lambda batch, padded_size: batch, is_host=True)
    runner = ModelRunner(SlowForward(), lambda logits, batch: StepLogits(logits), state, times)
    device = CpuDevice(0)
    profiler = StepProfiler(tmp_path / "made", 1, device, runner, None)
    return SimpleNamespace(runner=runner, profiler=profiler, model=model, folder=tmp_path / "made")


def test_decode_steps_are_timed_traced_and_then_left_alone(watched):
    before = {
        (owner, name): vars(owner)[name] for targets in PARTS.values() for owner, name in targets
    }
    forward = watched.model[0].forward
    watched.profiler.attach(watched.model)
    assert any(vars(owner)[name] is not value for (owner, name), value in before.items())
    watched.runner.run(make_batch(5))  # prefill counts nowhere
    for _ in range(
        worker_profiler.WARM_UP_STEPS
        + worker_profiler.TIMED_STEPS
        + worker_profiler.TRACED_STEPS
        + 1
    ):
        watched.runner.run(make_batch(1, 1))
    lines = (watched.folder / "decode-rank1.txt").read_text().splitlines()
    assert f"{worker_profiler.TIMED_STEPS} decode steps of 2.0 sequences" in lines[0]
    shown = {line[:32].strip(): float(line[32:41]) for line in lines[1:]}
    assert 1.0 <= shown["linears"] < 20
    assert 1.0 <= shown["rest of the pass"] < 20
    assert sum(shown.values()) == pytest.approx(float(lines[0].split()[-3]), rel=0.02)
    trace = json.loads((watched.folder / "trace-rank1.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert names.count("linears: Linear.forward") == worker_profiler.TRACED_STEPS
    assert all(vars(owner)[name] is value for (owner, name), value in before.items())
    assert watched.model[0].forward is forward
    assert "run" not in vars(watched.runner)


def test_mixed_steps_are_not_decode_steps(watched):
    watched.profiler.attach(watched.model)
    for _ in range(worker_profiler.WARM_UP_STEPS + 2):
        watched.runner.run(make_batch(1, 7))
    assert watched.profiler.clock.calls == {}
