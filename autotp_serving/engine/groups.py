"""Several groups of ranks behind one door: which runs a request, and who takes over. Head only.

Each group has an engine of its own, with its thread, scheduler and blocks. `EngineGroups` stands
where an engine does and passes on what it is told; its lock makes its books true for event loop
and engine threads alike, and is taken before an engine's own.

Past 250 lines, since a group's engine and the books of all groups move a sequence together.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from autotp_serving.batch import Runner
from autotp_serving.config import ServingConfig
from autotp_serving.engine.active_requests import ActiveRequests
from autotp_serving.engine.detokenizer import Detokenizer
from autotp_serving.engine.engine import Engine, EngineError
from autotp_serving.engine.sequence import Sequence as RunningSequence
from autotp_serving.engine.stats import EngineStats, add_stats
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import Request, RequestError, RequestOutput
from autotp_serving.step_times import RankTimes

logger = logging.getLogger(__name__)

MAX_LOOKED_UP = 16384
"""Tokens of a prompt that are looked for in each group's cache, at 16 in about a microsecond."""

FIRST_GUESS = 256
"""Tokens that a completion is taken to have before any has ended."""

GUESS_SHARE = 1 / 16
"""By which each that ends moves the guess."""


@dataclass(slots=True)
class Placed:
    """Where a request is.

    Attributes:
        num_left: tokens that it still costs its group, by estimate.
        is_aborted: it is to end wherever it arrives.
    """

    request: Request
    group: int
    num_left: int
    is_aborted: bool = False


class GroupEngine(Engine):
    """The engine of one group, which gives its sequences to others when its ranks are lost.

    Args:
        groups: all of them.
        index: this one's number.
        settings: an engine's own.
    """

    def __init__(self, groups: EngineGroups, index: int, *settings: Any, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.index = index
        self.ranks_name = f"The ranks of group {index}"
        self.is_left_out = False
        self._groups = groups

    @property
    def status(self) -> str:
        """Whether it runs requests, in a word."""
        if self.is_left_out:
            return "failed"
        return "ok" if self.outage is None else "recovering"

    def count_cached(self, token_ids: Sequence[int]) -> int:
        """Leading tokens that the prefix cache should hold; for any thread, and so a guess."""
        return self.scheduler.blocks.count_known(token_ids[:MAX_LOOKED_UP])

    def adopt(self, sequence: RunningSequence, detokenizer: Detokenizer) -> None:
        """Run another group's sequence on, from the tokens that it has. For any thread."""
        self._inbox.put(partial(self._adopt, sequence, detokenizer))

    def offer(self, num_requests: int) -> None:
        """Give so many that wait to groups that could run them at once. For any thread."""
        self._inbox.put(partial(self._hand_over, num_requests))

    def fail(self, message: str) -> None:
        """No ranks will come any more: the others do without, where there are any."""
        if self._groups.leave_out(self, message):
            self.lose(message)
        else:
            super().fail(message)

    def _add(self, request: Request) -> None:
        super()._add(request)
        if self.outage is not None:
            self._hand_over()

    def _lose(self, reason: str) -> None:
        super()._lose(reason)
        self._hand_over()

    def _resume(self, attach: Callable[[], None]) -> None:
        super()._resume(attach)
        self._groups.welcome(self)

    def _adopt(self, sequence: RunningSequence, detokenizer: Detokenizer) -> None:
        request = sequence.request
        with self._lock:
            self._active.add(request)
        self._output_processor.adopt(request.request_id, detokenizer)
        self.scheduler.adopt(sequence)
        if self.refusal is not None:
            self._end(request, "error", self.refusal, "recovering")
        elif self.outage is not None:
            self._hand_over()

    def _hand_over(self, num_requests: int = sys.maxsize) -> None:
        """Give those that wait to others, as long as one takes them."""
        self._output_processor.publish()  # what comes from there is to come later
        for sequence in tuple(self.scheduler.waiting)[:num_requests]:
            request = sequence.request
            relief = self._groups.find_relief(self, request)
            if relief is None:
                return
            self.scheduler.withdraw(sequence)
            detokenizer = self._output_processor.withdraw(request.request_id)
            self._runner.release(request.request_id)
            with self._lock:
                self._active.remove(request)
            self._groups.move(sequence, detokenizer, relief)


class EngineGroups:
    """Groups of ranks as one engine. See `Engine` for what its methods do.

    A request goes to the group that has the fewest tokens left to do, its own counted, and of
    those what is in a group's prefix cache not: so to where its prefix is cached, unless what is
    before it there takes longer than to compute it elsewhere. A group that could run it at once
    goes before all at which it would wait, and a request that waits goes to a group that has room
    later.

    Args:
        runners: one for each group.
        config: the server's settings; the queue is one for all groups.
        on_stalls: see Engine; one for each group.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        tokenizer: Tokenizer,
        config: ServingConfig,
        max_model_len: int,
        on_outputs: Callable[[list[RequestOutput]], None],
        on_stalls: Sequence[Callable[[str], None]],
    ) -> None:
        self._on_outputs = on_outputs
        self._max_num_seqs = config.max_num_seqs
        self._lock = threading.Lock()
        self._active = ActiveRequests(len(runners) * config.max_num_seqs + config.max_queue_len)
        self._placed: dict[str, Placed] = {}
        self._num_requests = [0] * len(runners)
        self._num_left = [0] * len(runners)
        self._num_computed = [0] * len(runners)  # prompt tokens, ever: they fill a group's cache
        self._guess = float(FIRST_GUESS)
        self._is_closed = False
        at_our_door = sys.maxsize - config.max_num_seqs
        self.engines = [
            GroupEngine(
                self, index, runner, tokenizer,
                # Without a seed, equal prompts are not to have equal completions in two groups.
                replace(config, max_queue_len=at_our_door, seed=config.seed + index),
                max_model_len, partial(self._deliver, index), on_stall=on_stall,
            )
            for index, (runner, on_stall) in enumerate(zip(runners, on_stalls, strict=True))
        ]  # fmt: skip

    @property
    def failure(self) -> str | None:
        """Why no request can run any more: the last group is gone, or an engine has failed."""
        return next((one.failure for one in self.engines if one.failure is not None), None)

    @property
    def outage(self) -> str | None:
        """How the ranks ended where no group has any."""
        if self._list_living():
            return None
        return next((one.outage for one in self.engines if not one.is_left_out), None)

    @property
    def refusal(self) -> str | None:
        """See Engine; where there is no group at which requests may wait."""
        if self._list_living() or self._list_waiting():
            return None
        return next((one.refusal for one in self.engines if not one.is_left_out), None)

    @property
    def last_step_time(self) -> float | None:
        """See Engine; of the groups that have ranks."""
        times = [one.last_step_time for one in self._list_living()]
        return max((time for time in times if time is not None), default=None)

    @property
    def is_sound(self) -> bool:
        """See Engine; of all groups that have ranks."""
        return all(one.is_sound for one in self._list_living())

    @property
    def rank_times(self) -> list[RankTimes]:
        """See Engine; one group's after the other's."""
        return [times for one in self.engines for times in one.rank_times]

    def submit(self, request: Request) -> None:
        """See Engine."""
        cached = [one.count_cached(request.prompt_token_ids) for one in self.engines]
        with self._lock:
            if self.failure is not None:
                raise EngineError(self.failure)
            if self._is_closed:
                raise EngineError("the server is shutting down")
            among = self._list_living() or self._list_waiting()
            if not among:
                raise EngineError(self.refusal or "no group of ranks takes requests")
            fitting = [one for one in among if _fits(one, request)]
            engine = self._choose(fitting or among, cached)
            engine.check(request)
            self._active.add(request)
            try:
                engine.submit(request)
            except BaseException:
                self._active.remove(request)
                raise
            num_prompt = len(request.prompt_token_ids) - cached[engine.index]
            placed = Placed(request, engine.index, num_prompt + self._guess_left(request, 0))
            self._placed[request.request_id] = placed
            self._count(placed, 1)
            self._num_computed[engine.index] += num_prompt

    def abort(self, request_id: str) -> None:
        """See Engine; also while it is on its way from one group to another."""
        with self._lock:
            placed = self._placed.get(request_id)
            if placed is not None:
                placed.is_aborted = True
                self.engines[placed.group].abort(request_id)

    def stats(self) -> EngineStats:
        """See Engine; of all groups together."""
        return add_stats([one.stats() for one in self.engines])

    def start(self) -> None:
        """See Engine."""
        for one in self.engines:
            one.start()

    def shutdown(self, drain_seconds: float = 0.0) -> bool:
        """See Engine."""
        with self._lock:
            self._is_closed = True
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return all(pool.map(lambda one: one.shutdown(drain_seconds), self.engines))

    def leave_out(self, engine: GroupEngine, message: str) -> bool:
        """Do without a group for good; False if there is no other."""
        with self._lock:
            engine.is_left_out = True
            has_others = not all(one.is_left_out for one in self.engines)
        if has_others:
            logger.error("Left out, while other groups go on: %s", message)
        return has_others

    def welcome(self, engine: GroupEngine) -> None:
        """A group has ranks again: it takes those that wait elsewhere."""
        for one in self.engines:
            if one is not engine:
                one.offer(self._max_num_seqs if one.outage is None else sys.maxsize)

    def find_relief(self, engine: GroupEngine, request: Request) -> GroupEngine | None:
        """Which other group a request that waits should go to; None if it should stay."""
        cached = [one.count_cached(request.prompt_token_ids) for one in self.engines]
        with self._lock:
            among = [one for one in self._list_living() if one is not engine]
            if engine.outage is None:
                among = [one for one in among if self._has_room(one)]
            elif engine.is_left_out and not among:
                among = self._list_waiting()
            among = [one for one in among if _fits(one, request)]
            return self._choose(among, cached) if among else None

    def move(
        self, sequence: RunningSequence, detokenizer: Detokenizer, engine: GroupEngine
    ) -> None:
        """Give a group a sequence that another has given up."""
        with self._lock:
            placed = self._placed[sequence.request_id]
            self._count(placed, -1)
            placed.group = engine.index
            num_output = sequence.num_output_tokens
            placed.num_left = sequence.num_tokens + self._guess_left(sequence.request, num_output)
            self._count(placed, 1)
            engine.adopt(sequence, detokenizer)
            if placed.is_aborted:
                engine.abort(sequence.request_id)

    def _deliver(self, group: int, outputs: list[RequestOutput]) -> None:
        """In a group's engine thread: keep the books, then hand on."""
        with self._lock:
            for output in outputs:
                placed = self._placed[output.request_id]
                left = self._guess_left(placed.request, output.num_output_tokens)
                self._num_left[group] += left - placed.num_left
                placed.num_left = left
                if output.finish_reason is not None:
                    self._retire(placed, output)
                    self._share_out(group)
        self._on_outputs(outputs)

    def _retire(self, placed: Placed, output: RequestOutput) -> None:
        del self._placed[output.request_id]
        self._count(placed, -1)
        self._active.remove(placed.request)
        if output.finish_reason in ("stop", "length"):
            self._guess += GUESS_SHARE * (output.num_output_tokens - self._guess)

    def _share_out(self, group: int) -> None:
        """Have a group that has more than it can run give to this one, which has room."""
        num_free = self._max_num_seqs - self._num_requests[group]
        if num_free <= 0 or self.engines[group].outage is not None:
            return
        fullest = max(range(len(self.engines)), key=self._num_requests.__getitem__)
        num_over = self._num_requests[fullest] - self._max_num_seqs
        if num_over > 0:
            self.engines[fullest].offer(min(num_free, num_over))

    def _choose(self, among: Sequence[GroupEngine], cached: Sequence[int]) -> GroupEngine:
        with_room = [one for one in among if self._has_room(one)]
        return min(
            with_room or among,
            key=lambda one: (
                self._num_left[one.index] - cached[one.index],
                self._num_requests[one.index],
                self._num_computed[one.index],
            ),
        )

    def _has_room(self, engine: GroupEngine) -> bool:
        return self._num_requests[engine.index] < self._max_num_seqs

    def _guess_left(self, request: Request, num_output_tokens: int) -> int:
        """Tokens that a completion is yet to have: as many as others had, within its limit."""
        most = request.params.max_tokens - num_output_tokens
        return max(0, min(most, max(1, round(self._guess) - num_output_tokens)))

    def _count(self, placed: Placed, sign: int) -> None:
        self._num_requests[placed.group] += sign
        self._num_left[placed.group] += sign * placed.num_left

    def _list_living(self) -> list[GroupEngine]:
        return [one for one in self.engines if one.outage is None and not one.is_left_out]

    def _list_waiting(self) -> list[GroupEngine]:
        """Groups whose ranks are on their way, and not overdue."""
        return [
            one
            for one in self.engines
            if one.outage is not None and one.refusal is None and not one.is_left_out
        ]


def _fits(engine: GroupEngine, request: Request) -> bool:
    try:
        engine.scheduler.check_fits(request)
    except RequestError:
        return False
    return True
