"""`--profile DIR`: where a decode step's time goes, and a trace of a few steps. Every rank.

Nothing here runs without the flag. With it, the functions that do a step's work are wrapped once
the model is loaded: first `TIMED_STEPS` decode steps are timed by plain clocks, since a profiler's
own cost would change the picture, then `TRACED_STEPS` run under torch's profiler, in whose trace
the same functions stand by name, those in C++ behind ctypes too. After that all is as before.
Each rank writes its own two files. On an accelerator the clocks wait for the device around every
part, so that each part's time is its own; the step as a whole is slower for it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp_serving.batch import Batch
from autotp_serving.devices import Device
from autotp_serving.kernels.cpu.attention import CpuAttention
from autotp_serving.kernels.cpu.dense import DenseMatmul
from autotp_serving.kernels.cpu.layer_ops import LayerOps
from autotp_serving.kernels.cpu.linear import CpuMatmul
from autotp_serving.kernels.reference.attention import PortableAttention
from autotp_serving.layers.head import VocabParallelHead
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.model.batch_state import BatchState
from autotp_serving.worker.runner import LeadRunner, ModelRunner
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.step_logits import LogitsGatherer, StepLogits

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 8
TIMED_STEPS = 40
TRACED_STEPS = 3
# Steps further apart than this had nothing to do in between.
LONGEST_PAUSE = 1.0

PARTS = {
    "linears": [
        (CpuMatmul, "__call__"), (DenseMatmul, "__call__"), (LowBitLinear, "forward"),
    ],
    "attention": [(CpuAttention, "attend"), (PortableAttention, "attend")],
    "head": [(VocabParallelHead, "forward"), (LogitsGatherer, "__call__")],
    "norms, rotation, activation": [
        (LayerOps, "rms_norm"), (LayerOps, "rotate_and_store"), (LayerOps, "silu_multiply"),
    ],
    "batch to tensors": [(BatchState, "apply")],
    "sampling": [(Sampler, "sample")],
}  # fmt: skip
COLLECTIVES = "collectives"
REST = "rest of the pass"
HOST = "host: scheduling, batches, text"
FORWARD = "pass"


class PartClock:
    """Adds up time by part; what runs inside another part counts for the inner one alone."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._wait = wait
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, part: str) -> None:
        """Something of this part begins."""
        self._charge()
        self.calls[part] += not self._open or self._open[-1] != part
        self._open.append(part)

    def leave(self) -> None:
        """What began last has ended."""
        self._charge()
        self._open.pop()

    def move(self, part: str, seconds: float) -> None:
        """A moment ago, so many seconds of the running part were really this part's."""
        self.seconds[part] += seconds
        self.calls[part] += 1
        if self._open:
            self.seconds[self._open[-1]] -= seconds

    def _charge(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class StepProfiler:
    """Watches one rank's steps until it has seen enough of them.

    Args:
        folder: where the files go; made if it is not there.
        lead: rank 0's runner, whose sampling and host time count as well.
    """

    def __init__(
        self, folder: Path, rank: int, device: Device, runner: ModelRunner, lead: LeadRunner | None
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._device = device
        self._runner = runner
        self._lead = lead
        self.clock = PartClock(device.synchronize)
        self._undo: list[Callable[[], None]] = []
        self._num_seen = 0
        self._num_timed = 0
        self._num_sequences = 0
        self._step_seconds = 0.0
        self._last_start: float | None = None
        self._is_timing = False
        self._trace: Any = None

    def attach(self, model: nn.Module) -> None:
        """Wrap what does the work."""
        for part, targets in PARTS.items():
            for owner, name in targets:
                self._wrap(owner, name, part)
        for module in model.modules():
            # Dense ones; DeepSpeed's classes, too, have Linear in their names.
            is_linear = "Linear" in type(module).__name__ and not isinstance(module, LowBitLinear)
            if is_linear and isinstance(getattr(module, "weight", None), torch.Tensor):
                self._wrap(module, "forward", "linears")
        times = self._runner.times
        add_collective = times.add_collective

        def count(num_bytes: int, seconds: float) -> None:
            add_collective(num_bytes, seconds)
            if self._is_timing:
                self.clock.move(COLLECTIVES, seconds)

        self._replace(times, "add_collective", count)
        self._replace(self._runner, "run", functools.partial(self._run, self._runner.run))
        if self._rank == 0:
            logger.info(
                "Profiling %d decode steps after %d others; files go to %s",
                TIMED_STEPS + TRACED_STEPS,
                WARM_UP_STEPS,
                self._folder,
            )

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        is_static = isinstance(vars(owner).get(name), staticmethod)
        inner = getattr(owner, name)
        label = f"{part}: {getattr(owner, '__name__', type(owner).__name__)}.{name}"

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._trace is not None:
                with torch.profiler.record_function(label):
                    return inner(*args, **kwargs)
            if not self._is_timing:
                return inner(*args, **kwargs)
            self.clock.enter(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self.clock.leave()

        self._replace(owner, name, staticmethod(timed) if is_static else timed)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute such that `_detach` restores what was there."""
        own = vars(owner)
        if name in own:
            self._undo.append(functools.partial(setattr, owner, name, own[name]))
        else:
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)

    def _run(self, run: Callable[[Batch], StepLogits], batch: Batch) -> StepLogits:
        """One forward pass; all ranks see the same batches, so all count the same steps."""
        self._begin_step(batch)
        if not self._is_timing:
            if self._trace is None:
                return run(batch)
            with torch.profiler.record_function("forward pass"):
                return run(batch)
        self.clock.enter(FORWARD)
        try:
            return run(batch)
        finally:
            self.clock.leave()

    def _begin_step(self, batch: Batch) -> None:
        """Close the step before, and decide what happens to this one."""
        now = time.perf_counter()
        if self._is_timing and self._last_start is not None:
            self._step_seconds += min(now - self._last_start, LONGEST_PAUSE)
        self._is_timing = False
        self._last_start = now
        if not batch.is_decode:
            return
        self._num_seen += 1
        number = self._num_seen - WARM_UP_STEPS
        if 0 < number <= TIMED_STEPS:
            self._is_timing = True
            self._num_timed += 1
            self._num_sequences += batch.num_seqs
        elif number == TIMED_STEPS + 1:
            self._write_breakdown()
            self._start_trace()
        elif number > TIMED_STEPS + TRACED_STEPS:
            self._finish()

    def _write_breakdown(self) -> None:
        text = self.format_breakdown()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"decode-rank{self._rank}.txt"
        path.write_text(text + "\n", encoding="utf-8")
        if self._rank == 0:
            logger.info("Where a decode step goes (%s):\n%s", path, text)

    def format_breakdown(self) -> str:
        """One screen: part, milliseconds a step, share, calls a step."""
        steps = max(1, self._num_timed)
        seconds = dict(self.clock.seconds)
        seconds[REST] = seconds.pop(FORWARD, 0.0)
        whole = max(self._step_seconds, sum(seconds.values()))
        name = HOST if self._lead is not None else "waiting for rank 0's next batch"
        seconds[name] = whole - sum(seconds.values())
        lines = [
            f"rank {self._rank}, {self._device.kind}: {steps} decode steps of "
            f"{self._num_sequences / steps:.1f} sequences, {whole / steps * 1e3:.2f} ms each"
        ]
        for part, value in sorted(seconds.items(), key=lambda item: -item[1]):
            calls = self.clock.calls[part] / steps
            count = f"  {calls:5.0f} calls" if calls and part not in (REST, FORWARD) else ""
            lines.append(f"{part:32}{value / steps * 1e3:9.3f} ms {value / whole:6.1%}{count}")
        return "\n".join(lines)

    def _start_trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self._device.is_host:
            activities.append(getattr(torch.profiler.ProfilerActivity, self._device.kind.upper()))
        self._trace = torch.profiler.profile(activities=activities)
        self._trace.start()

    def _finish(self) -> None:
        """Write the trace and take all wrappers off."""
        self._trace.stop()
        path = self._folder / f"trace-rank{self._rank}.json"
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        for undo in reversed(self._undo):
            undo()
        if self._rank == 0:
            logger.info(
                "Trace of %d decode steps in %s: open it at https://ui.perfetto.dev", TRACED_STEPS,
                path,
            )  # fmt: skip
