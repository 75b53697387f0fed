"""serving.py with a fault in its second rank: `faulty_serving.py FAULT FLAGS...`. Every rank.

FAULT is one of the functions below; nothing of the product knows of it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import serving
from autotp_serving.config import ConfigError
from autotp_serving.worker import worker
from autotp_serving.worker.runner import ModelRunner

NUM_GOOD_STEPS = 20


def step() -> None:
    """A step raises, as it would when memory runs out."""
    run = ModelRunner.run
    num_steps = 0

    def run_until_fault(runner: ModelRunner, batch: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps > NUM_GOOD_STEPS:
            raise RuntimeError("no memory left for this step")
        return run(runner, batch)

    ModelRunner.run = run_until_fault


def hang() -> None:
    """A step does not end, as where a driver has lost its card."""
    run = ModelRunner.run
    num_steps = 0

    def run_until_fault(runner: ModelRunner, batch: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps > NUM_GOOD_STEPS:
            time.sleep(3600)
        return run(runner, batch)

    ModelRunner.run = run_until_fault


def linger() -> None:
    """Each step takes 20 ms longer: what is to be met under way is still there, on any machine."""
    run = ModelRunner.run

    def run_slowly(runner: ModelRunner, batch: Any) -> Any:
        time.sleep(0.02)
        return run(runner, batch)

    ModelRunner.run = run_slowly


def load() -> None:
    """Loading raises what nobody expected."""

    def fail(*args: Any, **named: Any) -> None:
        raise RuntimeError("a shard vanished")

    worker.load_model = fail


def refuse() -> None:
    """Loading finds a mistake of the user's, on this rank alone."""

    def fail(*args: Any, **named: Any) -> None:
        raise ConfigError("rank 1 has no such card: start fewer ranks")

    worker.load_model = fail


def main() -> int:
    """Serve, at fault on rank 1."""
    fault = sys.argv.pop(1)
    follow = serving.follow

    def follow_at_fault(*args: Any) -> int:
        globals()[fault]()
        return follow(*args)

    serving.follow = follow_at_fault
    return serving.main()


if __name__ == "__main__":
    sys.exit(main())
