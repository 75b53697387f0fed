"""The engine: one thread on rank 0 that turns requests into outputs, one step after another.

Any thread may call `submit`, `abort`, `stats`, `shutdown`, `lose`, `resume` and `fail`; all but the
last leave a note in the inbox. All else happens in the engine's own thread, or in the caller's
where `step` is called by hand.

Past 250 lines, since these doors and the thread behind them share one inbox, one lock and one
failure. What they call has files of its own: which requests are active, which run, their text.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from autotp_serving.batch import Batch, DraftInput, Runner, RunnerLost
from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.config import ServingConfig
from autotp_serving.engine.active_requests import ActiveRequests
from autotp_serving.engine.adapters import AdapterTable
from autotp_serving.engine.batch_builder import Progress, Step
from autotp_serving.engine.block_store import BlockStore
from autotp_serving.engine.model_drafts import ModelDrafts
from autotp_serving.engine.output_processor import OutputProcessor
from autotp_serving.engine.scheduler import INVALID_NUMBERS, MAX_LOSSES, Scheduler
from autotp_serving.engine.stats import EngineStats
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.engine.watchdog import StepWatchdog
from autotp_serving.request import (
    Adapter,
    AdapterError,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    check_tokens,
)
from autotp_serving.step_times import RankTimes

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_FOR_LAST_STEP = 10.0
"""How long `shutdown` waits, after draining, for a step that is still under way."""

SECONDS_TO_STORE = 5.0
"""Of them, for blocks that no file has yet."""


TRIED_TOO_OFTEN = f"the ranks ended {MAX_LOSSES} times while they ran this request"

INTERNAL_ERROR = "internal error; see the server's log"

ENDS_OF_PROCESS = (KeyboardInterrupt, SystemExit)
"""Not a fault of what was running. All else is, the panics of libraries in Rust included."""


class EngineError(RuntimeError):
    """The engine takes no requests: it failed or shuts down. The message says why."""


class Engine:
    """Takes requests, runs them in steps, hands out their outputs.

    Args:
        runner: runs batches on all ranks.
        tokenizer: decodes, and knows the end tokens.
        config: the server's settings.
        max_model_len: most tokens of prompt and completion together.
        on_outputs: called once per step with all outputs of that step, in the engine's thread.
            Each request gets outputs until one has a `finish_reason`, and exactly one that does.
        on_failure: called once, after the last outputs, with the sentence that is in `failure`.
        on_stall: called instead, in a thread of its own, where a step does not end; it is given a
            sentence. By default the engine fails, as by `fail`.
        find_late_ranks: says who has not reported that it is done with the step under way.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: ServingConfig,
        max_model_len: int,
        on_outputs: Callable[[list[RequestOutput]], None],
        on_failure: Callable[[str], None] | None = None,
        on_stall: Callable[[str], None] | None = None,
        find_late_ranks: Callable[[], str] = lambda: "the runner",
    ) -> None:
        self.ranks_name = "The ranks"
        self.failure: str | None = None
        self.outage: str | None = None  # how the ranks ended, while others are on their way
        self.refusal: str | None = None  # for requests, once that takes too long
        self.last_step_time: float | None = None  # monotonic; of the last good one on all ranks
        self.is_sound = True  # the latest step to give numbers gave finite ones
        num_drafts = config.num_drafts if runner.can_draft else 0
        config = replace(config, speculative_tokens=num_drafts)
        self._runner = runner
        self.watchdog = StepWatchdog(config.step_timeout, self._tell_stall)
        self.scheduler = Scheduler(
            config,
            runner.num_blocks,
            runner.block_size,
            tokenizer.eos_token_ids,
            has_states=runner.has_states,
            make_store=self._make_store if runner.stored_blocks else None,
        )
        self.scheduler.drafter.plain_only = runner.max_in_flight > 1
        if config.draft_model is not None:
            drafts = ModelDrafts(self._draft, config.max_num_batched_tokens)
            self.scheduler.drafter.use_model(drafts)
        self.adapters = AdapterTable(
            config.max_loras if config.uses_adapters else 0, config.model_names
        )
        self._output_processor = OutputProcessor(tokenizer, on_outputs)
        self._vocab_size = tokenizer.vocab_size
        self._max_model_len = max_model_len
        self._pools = config.pools
        # Those that may run do not wait, even in the moment before the thread has seen them.
        self._active = ActiveRequests(config.max_num_seqs + config.max_queue_len)
        self._on_failure = on_failure
        self._on_stall = on_stall or self.fail
        self._find_late_ranks = find_late_ranks
        self._config = config
        self._patience: threading.Timer | None = None
        self._num_restarts = 0
        self._lock = threading.Lock()  # makes each of `submit`'s answers true when it is given
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closed = False
        self._deadline: float | None = None
        self._in_flight: deque[Step] = deque()
        self._num_steps = 0
        self._last_step_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not had its last output, or a step is in flight."""
        return bool(self._active or self._in_flight)

    def submit(self, request: Request) -> None:
        """Queue a request; its outputs come through `on_outputs`.

        Raises:
            RequestError: see `check`.
            QueueFullError: as many requests wait as may wait, in all or of one tenant.
            EngineError: the engine has failed or shuts down.
            ValueError: a request with this id is active.
        """
        self.check(request)
        with self._lock:
            if self.failure is not None:
                raise EngineError(self.failure)
            if self._closed:
                raise EngineError("the server is shutting down")
            if self.refusal is not None:
                raise EngineError(self.refusal)
            if request.adapter is not None and not self.adapters.is_loaded(request.adapter):
                raise EngineError(f"the adapter '{request.adapter.name}' has just been unloaded")
            self._active.add(request)
            self._inbox.put(partial(self._add, request))

    def check(self, request: Request) -> None:
        """Refuse a request that could never run. Reads constants only: safe in any thread.

        Raises:
            RequestError: prompt and completion are longer than the model or the KV cache allows, or
                one of its tokens is not in the vocabulary; or it asks for tokens of a model that
                embeds or reranks, or the other way round.
        """
        params = request.params
        if (params.pooling is not None) != self._pools:
            raise RequestError("pooling", "completions, embeddings and scores are not of one model")
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), params.max_tokens
        if num_prompt_tokens + max_tokens > self._max_model_len:
            raise RequestError(
                "prompt",
                f"{num_prompt_tokens} tokens of prompt and {max_tokens} of completion exceed "
                f"the {self._max_model_len} tokens that fit",
            )
        check_tokens("prompt", request.prompt_token_ids, self._vocab_size)
        check_tokens("stop_token_ids", params.stop_token_ids, self._vocab_size)
        check_tokens("logit_bias", params.logit_bias, self._vocab_size)
        self.scheduler.check_fits(request)

    def load_adapter(self, name: str, path: str) -> Future[Adapter]:
        """Load an adapter's folder on all ranks, between two steps. For any thread.

        Its result, or AdapterError: the folder is not served, or there is no room; EngineError:
        the ranks are gone.
        """
        return self._ask(partial(self._load_adapter, name, path))

    def unload_adapter(self, name: str) -> Future[None]:
        """Let no more requests begin with an adapter; those that have finish. For any thread.

        Its result, or AdapterError: there is none of this name.
        """
        return self._ask(partial(self._unload_adapter, name))

    def abort(self, request_id: str) -> None:
        """End a request before the next step; a last output says so. Unknown ids are ignored."""
        self._inbox.put(partial(self._abort, request_id))

    def stats(self) -> EngineStats:
        """Figures of this moment; cheap enough to ask for at any time."""
        scheduler = self.scheduler
        num_running = len(scheduler.running)
        return EngineStats(
            num_running=num_running,
            num_waiting=max(0, len(self._active) - num_running),
            num_blocks=scheduler.blocks.num_blocks,
            num_held_blocks=scheduler.blocks.num_held,
            num_steps=self._num_steps,
            num_prompt_tokens=self._output_processor.num_prompt_tokens,
            num_generated_tokens=self._output_processor.num_generated_tokens,
            num_prefix_query_tokens=scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_offload_hit_tokens=scheduler.num_offload_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_drafts=scheduler.drafter.num_drafts,
            num_draft_tokens=scheduler.drafter.num_draft_tokens,
            num_accepted_tokens=scheduler.drafter.num_accepted_tokens,
            num_restarts=self._num_restarts,
            num_finished=dict(self._output_processor.num_finished),
            last_step_seconds=self._last_step_seconds,
        )

    @property
    def rank_times(self) -> list[RankTimes]:
        """What the steps have cost each rank so far."""
        return list(self._runner.rank_times)

    def start(self) -> None:
        """Start the engine's thread; it sleeps until there is a request."""
        self.watchdog.start()
        self._thread.start()

    def shutdown(self, drain_seconds: float = 0.0) -> bool:
        """Take no more requests, finish those active within `drain_seconds`, abort the rest.

        Blocks until the thread has ended, so call it outside the event loop. Returns False if a
        step still runs several seconds after that: the runner hangs.
        """
        with self._lock:
            self._closed = True
            self._inbox.put(partial(self._set_deadline, time.monotonic() + drain_seconds))
        if self._thread.is_alive():
            self._thread.join(drain_seconds + SECONDS_FOR_LAST_STEP)
        else:
            self._run()
        self.watchdog.stop()
        return not self._thread.is_alive()

    def fail(self, message: str) -> None:
        """Take no more requests: a rank is gone, and the step under way may never end.

        For any thread. The requests get no last outputs; whoever sees `failure` ends them.
        """
        with self._lock:
            if self.failure is not None:
                return
            self.failure = f"the engine failed: {message}"
        logger.error("%s", self.failure)

    def lose(self, reason: str) -> None:
        """The ranks are gone, others are on their way: requests wait. For any thread."""
        self._inbox.put(partial(self._lose, reason))

    def resume(self, attach: Callable[[], None]) -> None:
        """Others are ready: run every request on from the tokens that it has. For any thread.

        Args:
            attach: gives them to the runner; called in the engine's thread.
        """
        self._inbox.put(partial(self._resume, attach))

    def step(self, *, wait: bool = False) -> None:
        """Take in what is in the inbox, begin steps, collect the oldest, hand out its outputs.

        As many are begun as may be in flight: with one it is begun and collected here, with two
        the next already runs while the outputs of this one are written. Where the next step needs
        the tokens of the one in flight, as drafts do, that is collected first.

        Args:
            wait: with nothing to run, sleep until there is a note in the inbox.

        Raises:
            EngineError: something failed; every request had a last output that says so.
        """
        if self.failure is not None:
            raise EngineError(self.failure)
        try:
            self._read_inbox(wait)
            started = time.perf_counter()
            waits = self.scheduler.wants_tokens()
            step = None if waits or self.outage is not None else self._schedule()
            oldest = self._in_flight[0] if self._in_flight else step
            if oldest is not None:
                self.watchdog.begin(oldest.num_tokens)
                try:
                    if waits:
                        self._collect_first()
                    else:
                        while step is not None:
                            self._launch(step)
                            step = self._schedule()
                        self._collect()
                finally:
                    self.watchdog.end()
            self._output_processor.publish()
            if self.adapters.has_leaving:
                self._drop_unused_adapters()
            if oldest is not None:
                self._last_step_seconds = time.perf_counter() - started
                seconds = self._last_step_seconds
                self.scheduler.drafter.add_step(oldest, seconds, waited=waits)
                self.scheduler.pace.add_step(oldest, seconds)
            self._store_blocks(oldest)
        except ENDS_OF_PROCESS:
            raise
        except RunnerLost as error:
            self._lose(str(error))
            self._output_processor.publish()
        except BaseException as error:  # a library's panic is no Exception
            if self.failure is None and not isinstance(error, ConnectionError):  # no rank is gone
                logger.exception("the engine failed")
            raise EngineError(self._fail(error)) from error

    def _schedule(self) -> Step | None:
        """The next step, unless as many as may be are in flight."""
        if len(self._in_flight) >= self._runner.max_in_flight:
            return None
        return self.scheduler.schedule()

    def _launch(self, step: Step) -> None:
        self._in_flight.append(step)
        self._runner.forward(step.batch)
        self._runner.sample(step.samples, step.scores, step.pools)

    def _make_store(self) -> BlockStore:
        return BlockStore(self._runner.stored_blocks, self._transfer)

    def _transfer(self, transfer: BlockTransfer) -> list[int]:
        return self._watch(partial(self._runner.transfer, transfer))

    def _draft(self, batch: Batch, drafts: list[DraftInput]) -> list[list[int]]:
        return self._watch(partial(self._runner.draft, batch, drafts))

    def _watch(self, work: Callable[[], list[T]]) -> list[T]:
        """Have the ranks do something between steps, which may hang as a step may."""
        if self.watchdog.is_watching:
            return work()
        self.watchdog.begin(0)
        try:
            return work()
        finally:
            self.watchdog.end(is_step=False)

    def _store_blocks(self, step: Step | None) -> None:
        """Store some that are full: after a step, which this is to slow little, or at leisure."""
        store = self.scheduler.blocks.store
        if store is None or self.outage is not None:
            return
        if step is not None:
            store.add_step(step.num_tokens, self._last_step_seconds)
        elif store.has_unsaved and not self.scheduler.has_work:
            store.store()

    def _store_the_rest(self) -> None:
        """At the end: what is lost otherwise is what the next server would begin with."""
        store = self.scheduler.blocks.store
        deadline = time.monotonic() + SECONDS_TO_STORE
        while store is not None and store.has_unsaved and time.monotonic() < deadline:
            store.store()

    def _run(self) -> None:
        """Step until shut down or failed: the thread's whole life."""
        try:
            while self._deadline is None or (self.has_work and time.monotonic() < self._deadline):
                self.step(wait=True)
            for request in self._active:
                self._end(request, "abort")
            self._output_processor.publish()
        except EngineError:
            return  # everyone has been told
        try:
            while self._in_flight:
                self._collect()
            if self.outage is None:
                self._store_the_rest()
        except RunnerLost:
            self._in_flight.clear()
        except Exception as error:
            logger.exception("the last step failed")
            self._fail(error)

    def _read_inbox(self, wait: bool) -> None:
        store = self.scheduler.blocks.store
        is_idle = not self.scheduler.has_work and (store is None or not store.has_unsaved)
        if wait and (self.outage is not None or is_idle):
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            with contextlib.suppress(Empty):  # the time to finish is over
                self._inbox.get(timeout=left)()
        while not self._inbox.empty():  # no one else takes from it
            self._inbox.get()()

    def _ask(self, answer: Callable[[], Any]) -> Future[Any]:
        """Have the engine's thread answer between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                if self.outage is not None:
                    raise EngineError(self.outage)
                while self._in_flight:
                    self._collect()
                future.set_result(answer())
            except (AdapterError, EngineError) as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(EngineError(f"the engine failed: {error}"))
                raise

        with self._lock:
            if self.failure is not None or self._closed:
                future.set_exception(EngineError(self.failure or "the server is shutting down"))
            else:
                self._inbox.put(run)
        return future

    def _load_adapter(self, name: str, path: str) -> Adapter:
        self._drop_unused_adapters()
        adapter = self.adapters.make(name, path)
        self._runner.load_adapter(adapter.slot, path)
        self.adapters.add(adapter)
        logger.info("Adapter %s is loaded from %s", name, path)
        return adapter

    def _unload_adapter(self, name: str) -> None:
        with self._lock:  # nobody begins with it in this moment
            self.adapters.remove(name)
        self._drop_unused_adapters()
        logger.info("Adapter %s is unloaded", name)

    def _drop_unused_adapters(self) -> None:
        """Free the slots of unloaded adapters whose last request has ended."""
        for adapter in self.adapters.take_unused(self._active):
            if self.outage is None:
                self._runner.drop_adapter(adapter.slot)

    def _load_adapters_anew(self) -> None:
        """Give ranks that know of nothing the adapters; what has gone meanwhile ends its requests.

        A slot that nobody uses holds nothing, so none is dropped.
        """
        self.adapters.take_unused(self._active)
        for adapter in self.adapters.held:
            try:
                self._runner.load_adapter(adapter.slot, adapter.path)
            except AdapterError as error:
                logger.error("Adapter %s is lost: %s", adapter.name, error)
                if self.adapters.is_loaded(adapter):
                    with self._lock:
                        self.adapters.remove(adapter.name)
                for request in self._active:
                    if request.adapter is adapter:
                        self._end(request, "error", f"the adapter '{adapter.name}' is lost")
        self.adapters.take_unused(self._active)

    def _add(self, request: Request) -> None:
        try:
            self._output_processor.open(request)
            self.scheduler.add(request)
        except ENDS_OF_PROCESS:
            raise
        except BaseException:
            logger.exception("request %s cannot begin", request.request_id)
            self._end(request, "error", INTERNAL_ERROR)

    def _abort(self, request_id: str) -> None:
        request = self._active.get(request_id)
        if request is not None:
            self._end(request, "abort")

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline

    def _lose(self, reason: str) -> None:
        """What was in flight is lost; everyone waits, and not for ever."""
        if self.outage is not None:
            self.outage = reason  # whoever starts them knows more than the step that they left
            return
        self.outage = reason
        self.watchdog.stop()
        self._in_flight.clear()
        for sequence in self.scheduler.restart():
            self._end(sequence.request, "error", TRIED_TOO_OFTEN)
        timeout = self._config.recovery_timeout
        note = partial(self._end_waiting, self._num_restarts)
        self._patience = threading.Timer(timeout, self._inbox.put, [note])
        self._patience.daemon = True
        self._patience.start()

    def _end_waiting(self, num_restarts: int) -> None:
        """Tell all that wait for ranks that these have not come, and let nobody else wait."""
        if self.outage is None or self._num_restarts > num_restarts:
            return
        self.refusal = (
            f"{self.outage}, and the ranks that are started anew were not ready within "
            f"{self._config.recovery_timeout:g} s (--recovery-timeout)"
        )
        for request in self._active:
            self._end(request, "error", self.refusal, "recovering")

    def _resume(self, attach: Callable[[], None]) -> None:
        """Go on, with ranks that know of nothing."""
        attach()
        self._load_adapters_anew()
        assert self._patience is not None, "nothing was lost"
        self._patience.cancel()
        self.scheduler.set_pool(self._runner.num_blocks)
        for sequence in tuple(self.scheduler.waiting):
            try:
                self.scheduler.check_fits(sequence.request)
            except RequestError as error:  # there is less memory than before
                self._end(sequence.request, "error", str(error))
        self.watchdog = StepWatchdog(self._config.step_timeout, self._tell_stall)
        self.watchdog.start()
        self._num_restarts += 1
        self.outage = self.refusal = None
        logger.info("%s are back: %d requests go on", self.ranks_name, len(self._active))

    def _collect(self) -> None:
        """Wait for the oldest step in flight and write what it did."""
        step = self._in_flight[0]
        self._write(step, self._take_result())

    def _collect_first(self) -> None:
        """Collect the step in flight, begin the next, and write what the first did meanwhile."""
        step = self._in_flight[0]
        done = self._take_result()
        try:
            following = self._schedule()
            if following is not None:
                self._launch(following)
        finally:  # the sequences have their tokens, even if the ranks are lost now
            self._write(step, done)

    def _take_result(self) -> list[Progress]:
        """Wait for the oldest step in flight; what it did."""
        result = self._runner.collect()
        return self.scheduler.update(self._in_flight.popleft(), result)

    def _write(self, step: Step, done: list[Progress]) -> None:
        """Write what a step did."""
        for progress in done:
            self._emit(progress)
        self._num_steps += 1
        self._judge(step, done)

    def _judge(self, step: Step, done: list[Progress]) -> None:
        """Note whether a step was good: one that gave NaN ran on all ranks, and proves nothing."""
        sequences = [progress.sequence for progress in done]
        invalid = [one.request_id for one in sequences if one.error == INVALID_NUMBERS]
        if invalid:
            logger.error("invalid numbers (NaN or infinity) for request %s", ", ".join(invalid))
        if step.sampled or step.scored or step.pooled:
            self.is_sound = not invalid
        if self.is_sound:
            self.last_step_time = time.monotonic()

    def _emit(self, progress: Progress) -> None:
        """Write the output of a sequence that got a token in a step or ended with it."""
        sequence = progress.sequence
        reason = self._output_processor.add(progress)
        if reason is not None:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, reason)
            self._retire(sequence.request, reason)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        error: str | None = None,
        error_code: str | None = None,
    ) -> None:
        """End a request between steps, wherever it is, and say so in its last output."""
        sequence = self.scheduler.abort(request.request_id, reason)
        self._output_processor.add_end(request, sequence, reason, error, error_code)
        self._retire(request, reason)

    def _retire(self, request: Request, reason: FinishReason) -> None:
        """Forget a request everywhere: the one way out."""
        self._output_processor.close(request.request_id, reason)
        self._runner.release(request.request_id)
        with self._lock:
            self._active.remove(request)

    def _tell_stall(self, limit: float) -> None:
        """In the watchdog's thread: the step under way has had its time."""
        late = self._find_late_ranks()
        self._on_stall(f"step {self._num_steps} has not ended within {limit:.0f} s: {late}")

    def _fail(self, error: BaseException) -> str:
        """Refuse all that comes, end all that is active, tell the owner; returns the sentence."""
        detail = str(error).strip().partition("\n")[0]
        failure = f"the engine failed: {type(error).__name__}: {detail}".rstrip(": ")
        self.watchdog.stop()
        with self._lock:
            if self.failure is None:
                logger.error("%s", failure)
            failure = self.failure = self.failure or failure
        try:
            self._in_flight.clear()
            self.scheduler.drop_steps()
            for request in self._active:
                self._end(request, "error", failure)
            self._output_processor.publish()
        except Exception:
            logger.exception("not every request could be told that the engine failed")
        if self._on_failure is not None:
            self._on_failure(failure)
        return failure
