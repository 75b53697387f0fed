"""Keeps a group of ranks running: starts it, and starts it anew when it has died. Head only.

One thread for the head's whole life, which sleeps while the ranks are well. What it finds it tells
the engine, whose sequences wait meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from typing import Protocol

from autotp_serving.config import ServingConfig
from autotp_serving.head.places import ANYWHERE, GroupPlace
from autotp_serving.head.ranks import RankProcesses, RanksLost, RanksRefused
from autotp_serving.head.runner import RemoteRunner
from autotp_serving.head.wire import Ready

logger = logging.getLogger(__name__)

START_SECONDS = 3600.0
"""For the first start, which may download and compile."""

RESTART_SECONDS = 600.0
RESTART_SLACK = 10.0
"""For each further one: so long, or so many times what the first took if that is more."""

CALM_SECONDS = 600.0
"""Ranks that were well for so long are well: what happened before counts no more."""

LAST_WORDS_SECONDS = 0.3
"""What launcher and ranks get, after one has died, to write what they know of it."""

MAX_DELAY_SECONDS = 30.0


class Recoverable(Protocol):
    """What the supervisor asks of the engine. For any thread."""

    def lose(self, reason: str) -> None:
        """The ranks are gone, others may come."""
        ...

    def resume(self, attach: Callable[[], None]) -> None:
        """Others are here; `attach` is to be called in the engine's thread."""
        ...

    def fail(self, message: str) -> None:
        """None will come."""
        ...


class Supervisor:
    """Runs one group of ranks after another.

    Args:
        launcher: the command before a rank's own.
        runner: the engine's, which the first group is given before there is an engine.
        place: where they run.
        num_loading: groups that load at first beside this one, itself included.
    """

    def __init__(
        self,
        launcher: list[str],
        config: ServingConfig,
        num_ranks: int,
        runner: RemoteRunner,
        place: GroupPlace = ANYWHERE,
        num_loading: int = 1,
    ) -> None:
        self._launcher, self._config, self._num_ranks = launcher, config, num_ranks
        self._place, self._num_loading = place, num_loading
        self._who = f"group {place.name}: " if place.name else ""
        self.runner = runner
        self.first: Future[Ready] = Future()
        self._engine: Future[Recoverable] = Future()
        self._group: RankProcesses | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # no group is started once stopped
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> Ready:
        """Start the ranks and wait until they have loaded.

        Raises:
            RanksRefused: they cannot start.
            RanksLost: they have ended as often as they may.
        """
        self.begin()
        return self.first.result()

    def begin(self) -> None:
        """Start the ranks."""
        self._thread.start()

    def give_engine(self, engine: Recoverable) -> None:
        """Whom to tell from now on; ranks may have died while it was made."""
        self._engine.set_result(engine)

    def end_group(self, reason: str) -> None:
        """Give the ranks up, as those that hang are. For any thread."""
        group = self._group
        if group is not None:
            group.lose(reason)

    def stop(self) -> None:
        """End the ranks and start none any more; waits until they are gone."""
        with self._lock:
            self._stopped.set()
            group = self._group
        self._engine.cancel()
        if group is not None:
            group.stop()
            group.lose("the server stops")
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        """The thread's whole life."""
        with contextlib.suppress(CancelledError):  # stopped before there was an engine
            self._run_groups()

    def _run_groups(self) -> None:
        """One group after another."""
        num_failures = epoch = 0
        limit = START_SECONDS
        reason = ""
        while True:
            epoch += 1
            started = time.monotonic()
            with self._lock:
                if self._stopped.is_set():
                    return
                group = self._group = RankProcesses(
                    self._launcher, self._config, self._num_ranks, self._place,
                    1 if self.first.done() else self._num_loading,
                )  # fmt: skip
            try:
                ready = group.wait_ready(limit)
                self._hand_over(group, ready, epoch, reason)
            except RanksRefused as error:
                reason = f"{self._who}{error}"
                if not self.first.done():
                    group.kill()
                    self.first.set_exception(RanksRefused(reason))
                    return
            except RanksLost as error:
                reason = f"{self._who}{error}"
            else:
                began = time.monotonic()
                limit = max(RESTART_SECONDS, RESTART_SLACK * (began - started))
                reason = f"{self._who}{group.wait_loss()}"
                if time.monotonic() - began >= CALM_SECONDS:
                    num_failures = 0
            if self._stopped.is_set():
                return
            has_run = self.runner.num_collected > 0
            num_failures += 1
            if not self._tell(reason, num_failures):
                group.kill()
                return
            self._stopped.wait(LAST_WORDS_SECONDS)
            group.kill()
            if not has_run:
                self._stopped.wait(min(MAX_DELAY_SECONDS, 2.0 ** (num_failures - 1)))

    def _hand_over(self, group: RankProcesses, ready: Ready, epoch: int, reason: str) -> None:
        """Give the engine a group that is ready.

        Args:
            reason: how the group before has ended.

        Raises:
            RanksRefused: it is not like the first.
        """

        def attach() -> None:
            self.runner.attach(group.line, ready, epoch)

        if not self.first.done():
            attach()
            group.watch()
            self.first.set_result(ready)
            return
        if not ready.serves_like(self.first.result()):
            raise RanksRefused("the ranks that were started anew are not like the first: has the "
                               "model's folder changed?")  # fmt: skip
        group.watch()
        engine = self._engine.result()
        engine.lose(reason)  # it may have been made since
        engine.resume(attach)

    def _tell(self, reason: str, num_failures: int) -> bool:
        """Tell the engine of a group's end; False if it was one too many."""
        max_restarts = self._config.max_restarts
        if num_failures <= max_restarts:
            logger.warning(
                "%s: the ranks are started anew (%d of at most %d times)",
                reason, num_failures, max_restarts,
            )  # fmt: skip
            if self._engine.done():
                self._engine.result().lose(reason)
            return True
        message = (
            f"{reason}; the ranks have ended {num_failures} times in a row, and are not started "
            f"anew more than {max_restarts} times (--max-restarts)"
        )
        if self.first.done():
            self._engine.result().fail(message)
        else:
            self.first.set_exception(RanksLost(message))
        return False


def start_groups(supervisors: Sequence[Supervisor], *, in_turn: bool) -> Ready:
    """Start all groups and wait until they have loaded; what all of them are like.

    Args:
        in_turn: one after another, as where all take from one memory what is left.

    Raises:
        RanksRefused: one cannot start, or is not like the others.
        RanksLost: one has ended as often as it may.
    """
    for supervisor in supervisors:
        supervisor.begin()
        if in_turn:
            supervisor.first.result()
    futures = [supervisor.first for supervisor in supervisors]
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result()
    first, *others = [future.result() for future in futures]
    for number, other in enumerate(others, start=1):
        if not other.serves_like(first):
            raise RanksRefused(
                f"group {number} is not like group 0: {other.describe()}, not {first.describe()}. "
                "Are there as many devices as all groups need?"
            )
    return first
