"""Continuous batching: which sequences run in the next step, and what becomes of them. Rank 0 only.

Iteration-level scheduling after Yu et al. 2022, "Orca"; chunked prefill after Agrawal et al. 2024,
"Sarathi-Serve". First come, first served, in turns between API keys (see `WaitingQueue`), or by
priority (see `PriorityQueue`).
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from itertools import islice

from autotp_serving.batch import INVALID_TOKEN, MAX_SCORED_ROWS, StepResult
from autotp_serving.config import ServingConfig
from autotp_serving.engine.batch_builder import Progress, Step, build_step
from autotp_serving.engine.block_manager import BlockManager, find_root
from autotp_serving.engine.block_store import BlockStore
from autotp_serving.engine.drafts import Drafter
from autotp_serving.engine.model_drafts import Reading
from autotp_serving.engine.priority_queue import PriorityQueue
from autotp_serving.engine.sequence import NO_ROW, Sequence, make_draw_key
from autotp_serving.engine.shared_prefill import should_wait
from autotp_serving.engine.state_slots import StateSlots
from autotp_serving.engine.step_pace import StepPace
from autotp_serving.engine.waiting_queue import WaitingQueue
from autotp_serving.request import FinishReason, Request, RequestError

MAX_GUIDE_WAIT_SECONDS = 0.005
"""In which the engine hears of nothing new."""

MAX_LOSSES = 3
"""A sequence that was in the step in flight each of so many times that the ranks were lost, without
a token in between, is not tried again."""

STRUCTURE_CODE = "structure_too_complex"

INVALID_NUMBERS = "the model produced invalid numbers (NaN or infinity) for this request"


class Scheduler:
    """Owns the waiting and the running sequences, their rows and their blocks.

    The running list is in order of priority and, within one, of admission: that takes the head of
    the queue, and preemption puts the last back there. So preempting from the end never hits one
    that is already scheduled. Nobody is admitted while one is in the middle of its prompt, so only
    one can be.

    Steps may be begun before the last is collected. What such a step brings for a sequence that
    has ended meanwhile is dropped, and the blocks that it may still write are free only then.
    Nothing is preempted while a step is in flight: the engine first collects.

    Args:
        config: limits of a step, prefix caching, seed.
        num_blocks: blocks in the pool.
        block_size: tokens a block holds.
        eos_token_ids: tokens that end a text unless the request ignores them.
        has_states: the model's layers keep states beside the blocks.
        make_store: what keeps blocks beyond the pool, for each new pool; None for nothing.
    """

    def __init__(
        self,
        config: ServingConfig,
        num_blocks: int,
        block_size: int,
        eos_token_ids: frozenset[int],
        *,
        has_states: bool = False,
        make_store: Callable[[], BlockStore] | None = None,
    ) -> None:
        self._config = config
        self._has_states = has_states
        self._make_store = make_store
        self.blocks = self._make_blocks(num_blocks, block_size)
        self.drafter = Drafter(config.speculative_tokens or 0)
        self.pace = StepPace(config.max_step_ms)
        self.waiting = _make_queue(config.scheduling_policy)
        self.running: list[Sequence] = []
        self.num_arrivals = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self.num_offload_hit_tokens = 0
        self._num_score_rows_left = 0
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_begun = 0
        self._in_flight: deque[Step] = deque()
        # Of sequences that ended with a step in flight: its number, blocks, whether to forget them.
        self._leftovers: deque[tuple[int, list[int], bool]] = deque()
        self._state_copies: list[int] = []  # for the next batch

    @property
    def has_work(self) -> bool:
        """True while a sequence runs or waits, or a step is in flight."""
        return bool(self._sequences or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Steps begun and not collected."""
        return len(self._in_flight)

    def check_fits(self, request: Request) -> None:
        """Refuse what could never run, even alone. Reads constants only: safe in any thread.

        Raises:
            RequestError: prompt and completion need more blocks than there are, or a prompt that
                cannot run in chunks more tokens than a step has.
        """
        num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
        # The last token of a completion is only given out, it never enters the cache.
        num_kept = max(num_tokens - 1, len(request.prompt_token_ids))
        if self.blocks.num_blocks_for(num_kept) > self.blocks.num_blocks:
            raise RequestError(
                "prompt",
                f"{len(request.prompt_token_ids)} tokens of prompt and up to "
                f"{request.params.max_tokens} of completion do not fit in the KV cache of "
                f"{self.blocks.num_blocks * self.blocks.block_size} tokens",
            )
        pooling, limit = request.params.pooling, self._config.max_num_batched_tokens
        if pooling is not None and pooling.whole and num_tokens > limit:
            raise RequestError(
                "prompt",
                f"{num_tokens} tokens do not fit in one step, in which this model has to see them "
                f"all: {limit} (--max-num-batched-tokens)",
            )

    def add(self, request: Request) -> Sequence:
        """Queue a request that `check_fits` let pass."""
        draw_key = make_draw_key(request.params.seed, self._config.seed, self.num_arrivals)
        eos_token_ids = frozenset() if request.params.ignore_eos else self._eos_token_ids
        sequence = Sequence(request, draw_key, eos_token_ids.union(request.params.stop_token_ids))
        self.num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> Step | None:
        """Begin the next step, or None when there is nothing to run before another is collected.

        A sequence whose guide does not know yet what may come next sits the step out; so does one
        whose next token depends on one that is in flight. Where nothing is in flight and nothing
        else to do, this waits for a guide, and not for long: others may arrive. Nothing begins
        before drafts in flight are verified.
        """
        if self._in_flight and self._in_flight[-1].drafts:
            return None
        chunks = self._choose_chunks()
        if not chunks and not self._in_flight:
            late = [one.guide for one in self.running if not one.is_ready and one.guide]
            if late:
                late[0].wait(MAX_GUIDE_WAIT_SECONDS)
                chunks = self._choose_chunks()
        if not chunks:
            return None
        self._num_begun += 1
        step = build_step(self._num_begun, chunks, self._propose_drafts(chunks))
        step.batch.state_copies, self._state_copies = self._state_copies, []
        self._keep_states(step)
        self._in_flight.append(step)
        return step

    def wants_tokens(self) -> bool:
        """Whether the step in flight is to be collected before the next is scheduled.

        What follows drafts depends on how many are accepted, and drafts on the tokens before them.
        """
        if not self._in_flight:
            return False
        if self._in_flight[-1].drafts:
            return True
        if any(sequence.num_unscheduled_tokens > 1 for sequence in self.running):
            return False
        decoding = [one for one in self.running if one.num_unscheduled_tokens and one.is_ready]
        num_left = self._config.max_decode_rows - len(decoding)
        return bool(decoding) and self.drafter.wants_tokens(decoding, num_left)

    def _choose_chunks(self) -> list[tuple[Sequence, int]]:
        """Sequences that run next, each with how many of its tokens."""
        budget = self._config.max_num_batched_tokens
        chunks: list[tuple[Sequence, int]] = []
        # A completion's next token goes first, so a long prompt never stops those that stream.
        # Preemption shortens the list at its end while this loop walks towards it.
        prefilling = None
        for sequence in self.running:
            num_tokens = sequence.num_unscheduled_tokens
            if num_tokens > 1:
                prefilling = sequence
            if num_tokens != 1 or not sequence.is_ready:
                continue
            if self._make_room(sequence):
                chunks.append((sequence, 1))
                budget -= 1
            elif self._in_flight:
                return []  # what is in flight may give blocks back; else someone has to go
        self._num_score_rows_left = MAX_SCORED_ROWS
        if chunks:
            budget = self.pace.limit(budget)
        if prefilling is not None:
            budget = self._add_prefill(chunks, prefilling, budget)
        while budget > 0 and (admitted := self._admit(chunks)):
            budget = self._add_prefill(chunks, admitted, budget)
        return chunks

    def _propose_drafts(self, chunks: list[tuple[Sequence, int]]) -> dict[Sequence, list[int]]:
        """Drafts for sequences that decode, as far as tokens of a step, logits and blocks go.

        None behind tokens that are in flight.
        """
        if self._in_flight:
            return {}
        num_tokens = sum(query_len for _, query_len in chunks)
        num_left = min(
            self._config.max_num_batched_tokens - num_tokens,
            self._config.max_decode_rows - len(chunks),
            self._num_score_rows_left,
        )
        decoding = [sequence for sequence, _ in chunks if sequence.num_unscheduled_tokens == 1]
        return self.drafter.propose(decoding, num_left, self._has_room)

    def _has_room(self, sequence: Sequence, num_drafts: int) -> bool:
        """Get blocks for drafts, unless others may soon need them."""
        num_tokens = sequence.num_tokens + num_drafts
        num_missing = self.blocks.num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing > 0 and num_missing + len(self.running) > self.blocks.num_available:
            return False
        return self.blocks.grow(sequence.block_table, num_tokens)

    def update(self, step: Step, result: StepResult) -> list[Progress]:
        """Take in what the runner returned for the oldest step in flight.

        Sequences that are done get their `finish_reason` and give back their blocks.

        Returns:
            What the step did for sequences that got a token in it or ended with it.
        """
        assert self._in_flight.popleft() is step, "steps are collected in the order they began"
        self._free_leftovers(step.number)
        late = {one for one in step.sequences if one.finish_reason is not None}
        for sequence, query_len in zip(step.sequences, step.batch.query_lens, strict=True):
            if sequence.finish_reason is None:
                sequence.num_computed_tokens += query_len - len(step.drafts.get(sequence, ()))
                self._register_full_blocks(sequence)
        self._attach_states(step)
        for sequence, scores in zip(step.scored, result.scores, strict=True):
            sequence.prompt_logprobs.extend(scores)
            is_nan = any(math.isnan(one.logprob) for one in scores)
            if is_nan and sequence.finish_reason is None:
                self._fail(sequence, INVALID_NUMBERS)
        for sequence, pooled in zip(step.pooled, result.pooled, strict=True):
            if sequence.finish_reason is not None or pooled is None:
                continue
            sequence.pooled = pooled
            if pooled:
                self.finish(sequence, "stop")
            else:
                self._fail(sequence, INVALID_NUMBERS)
        for sequence in step.read:
            if sequence.finish_reason is None:
                self.finish(sequence, "length")
        every = result.logprobs or [None] * len(step.sampled)
        progress = []
        for sequence, token_ids, logprobs in zip(
            step.sampled, result.token_ids, every, strict=True
        ):
            sequence.num_pending_tokens -= 1
            if sequence not in late:
                num_taken = self._take_tokens(sequence, token_ids)
                if sequence in step.drafts:
                    self._settle_drafts(sequence, len(step.drafts[sequence]), len(token_ids) - 1)
                taken = logprobs and logprobs[:num_taken]
                progress.append(Progress(sequence, token_ids[:num_taken], taken))
        for sequence in dict.fromkeys((*step.read, *step.scored, *step.pooled)):
            is_over = sequence.finish_reason is not None and sequence not in late
            if is_over and sequence not in step.sampled:
                progress.append(Progress(sequence, []))
        return progress

    def _settle_drafts(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Count a sequence's accepted drafts as run; what refused ones left is written over."""
        self.drafter.add_outcome(sequence, num_drafts, num_accepted)
        if sequence.finish_reason is None:
            sequence.num_scheduled_tokens += num_accepted
            sequence.num_computed_tokens += num_accepted
            self._register_full_blocks(sequence)
            self.blocks.shrink(sequence.block_table, sequence.num_tokens)
            num_blocks = len(sequence.block_table)
            sequence.num_sent_blocks = min(sequence.num_sent_blocks, num_blocks)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is: the one way out, its blocks are available at once.

        If a step in flight may still write them, then once that is collected.
        """
        assert sequence.finish_reason is None
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]
        # After numbers that are not finite, its blocks may be what is broken.
        forget = reason == "error"
        if sequence.row == NO_ROW:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._return_row(sequence)
        if self._in_flight and sequence.last_step >= self._in_flight[0].number:
            self._leftovers.append((sequence.last_step, sequence.block_table, forget))
            sequence.block_table = []
        else:
            self.blocks.release(sequence.block_table, forget=forget)

    def drop_steps(self) -> None:
        """Expect nothing more of the steps in flight: the runner has failed."""
        if self.blocks.states is not None:
            for row in self._list_reserved_states():
                self.blocks.states.free(row)
        self._in_flight.clear()
        self._free_leftovers(self._num_begun)

    def restart(self) -> list[Sequence]:
        """Begin anew: the ranks are gone, with all blocks. What runs waits again, in its order.

        Returns:
            Sequences that were in a lost step so often that it may be their doing.
        """
        lost = {sequence for step in self._in_flight for sequence in step.sequences}
        self.drop_steps()
        while self.running:
            self._preempt().num_pending_tokens = 0
        suspects = []
        for sequence in lost:
            if sequence.finish_reason is not None:
                continue
            has_moved = sequence.num_tokens > sequence.len_at_loss
            sequence.num_losses = 1 if has_moved else sequence.num_losses + 1
            sequence.len_at_loss = sequence.num_tokens
            if sequence.num_losses >= MAX_LOSSES:
                suspects.append(sequence)
        self.set_pool(self.blocks.num_blocks)
        return suspects

    def set_pool(self, num_blocks: int) -> None:
        """Begin with an empty pool of so many blocks; nothing runs."""
        assert not self.running
        self.blocks = self._make_blocks(num_blocks, self.blocks.block_size)
        self._state_copies = []

    def withdraw(self, sequence: Sequence) -> None:
        """Forget a sequence that waits: it goes to another scheduler."""
        self.waiting.remove(sequence)
        del self._sequences[sequence.request_id]

    def adopt(self, sequence: Sequence) -> None:
        """Queue one that was withdrawn from another scheduler, with the tokens that it has."""
        sequence.last_step = 0  # steps are numbered anew here
        self._sequences[sequence.request_id] = sequence
        self.waiting.adopt(sequence)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """End a request by its id; None when there is no such request (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence, reason)
        return sequence

    def check_integrity(self) -> None:
        """Audit lists and blocks against each other. Raises AssertionError."""
        sequences = [*self.running, *self.waiting]
        assert self._sequences == {seq.request_id: seq for seq in sequences}
        for seq in self.waiting:
            assert not seq.block_table, f"{seq.request_id} waits and holds blocks"
            assert seq.num_computed_tokens == seq.num_registered_blocks == 0
            assert seq.num_scheduled_tokens == seq.num_pending_tokens == seq.num_sent_blocks == 0
            assert seq.row == NO_ROW
        rows = [*self._free_rows, *(seq.row for seq in self.running)]
        assert sorted(rows) == list(range(self._config.max_num_seqs)), "a row is lost"
        for seq in self.running:
            assert seq.num_computed_tokens < seq.num_tokens
            assert seq.num_unscheduled_tokens >= 0
            assert seq.num_computed_tokens <= seq.num_scheduled_tokens
            assert self.blocks.num_blocks_for(seq.num_scheduled_tokens) <= len(seq.block_table)
            assert seq.num_sent_blocks <= len(seq.block_table)
            num_samples = sum(seq in step.sampled for step in self._in_flight)
            assert seq.num_pending_tokens == num_samples
            num_full_blocks = seq.num_computed_tokens // self.blocks.block_size
            assert seq.num_registered_blocks == num_full_blocks
        tables = [seq.block_table for seq in self.running]
        tables += [table for _, table, _ in self._leftovers]
        self.blocks.check_integrity(tables, self._list_reserved_states())

    def _make_blocks(self, num_blocks: int, block_size: int) -> BlockManager:
        reuses = self._config.enable_prefix_caching
        states = None
        if self._has_states and reuses:
            first = self._config.num_rows
            states = StateSlots(range(first, first + self._config.num_kept_states))
        store = self._make_store() if self._make_store is not None else None
        return BlockManager(
            num_blocks, block_size, enable_prefix_caching=reuses, states=states, store=store
        )

    def _make_room(self, sequence: Sequence) -> bool:
        """Get blocks for one more token, at the cost of later ones; False if it had to go.

        Also False, and nobody has to go, while a step is in flight.
        """
        num_tokens = sequence.num_tokens + sequence.num_pending_tokens
        while not self.blocks.grow(sequence.block_table, num_tokens):
            if self._in_flight or self._preempt() is sequence:
                return False
        return True

    def _preempt(self) -> Sequence:
        """Send the last back to the head of the queue, to be computed anew."""
        victim = self.running.pop()
        self.blocks.release(victim.block_table)
        self._return_row(victim)
        victim.num_sent_blocks = 0
        victim.num_scheduled_tokens = 0
        victim.num_computed_tokens = 0
        victim.num_registered_blocks = 0
        if victim.drafts is not None:
            victim.drafts.reading = Reading()
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(victim)
        return victim

    def _admit(self, chunks: list[tuple[Sequence, int]]) -> Sequence | None:
        """Move the head of the queue into the running list with all blocks it needs by now.

        None where there is no head or no room for it, or where it waits for blocks that are being
        computed: by a step in flight, or by these chunks of the next.
        """
        if not self.waiting or len(self.running) >= self._config.max_num_seqs:
            return None
        sequence = self.waiting.head
        matched = self.blocks.match(sequence.token_ids, find_root(sequence.request.adapter))
        pooling = sequence.params.pooling
        if pooling is not None and not pooling.can_reuse:
            matched = []  # tokens taken from the cache would give no hidden states
        elif sequence.num_unscored_tokens:  # nor logits
            del matched[len(sequence.prompt_logprobs) // self.blocks.block_size :]
        elif self._waits_for_others(matched, chunks):
            return None
        num_known, state = len(matched), None
        if self.blocks.states is not None:
            matched, state = self.blocks.states.find(matched)
        # One block stays for each that runs, or the newcomer would soon be preempted for it.
        num_needed = self.blocks.num_needed(sequence.num_tokens, matched) + len(self.running)
        if num_needed > self.blocks.num_available:
            return None
        insort(self.running, self.waiting.pop(), key=lambda one: one.priority)
        sequence.row = self._free_rows.pop()
        self.blocks.take(sequence.block_table, matched)
        self.blocks.grow(sequence.block_table, sequence.num_tokens)
        sequence.num_registered_blocks = len(matched)
        sequence.num_computed_tokens = len(matched) * self.blocks.block_size
        sequence.num_scheduled_tokens = sequence.num_computed_tokens
        if state is not None:
            self._state_copies += state, sequence.row
        self._plan_states(sequence, num_known)
        if sequence.num_preemptions == 0:
            sequence.queue_seconds = time.monotonic() - sequence.request.arrival_time
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_query_tokens += sequence.num_tokens
            self.num_prefix_hit_tokens += sequence.num_computed_tokens
        return sequence

    def _waits_for_others(self, matched: list[int], chunks: list[tuple[Sequence, int]]) -> bool:
        """Whether the head of the queue is better off with blocks that others are computing."""
        if not self._config.enable_prefix_caching:
            return False
        query_lens = dict(chunks)
        ends = [(one, one.num_scheduled_tokens + query_lens.get(one, 0)) for one in self.running]
        head = self.waiting.head
        num_free = self._config.max_num_seqs - len(self.running)
        others = islice((one for one in self.waiting if one is not head), num_free - 1)
        return should_wait(
            head,
            others,
            matched,
            ends,
            self.blocks.block_size,
            has_states=self._has_states,
        )

    def _add_prefill(
        self, chunks: list[tuple[Sequence, int]], sequence: Sequence, budget: int
    ) -> int:
        """Schedule as much of a prompt as the step allows.

        Returns:
            Tokens left for others: none, unless the prompt is complete, because only the last in
            the running list may be in the middle of one.
        """
        budget -= self._load_blocks(sequence, budget)
        query_len = min(budget, sequence.num_unscheduled_tokens)
        pooling = sequence.params.pooling
        if pooling is not None and pooling.whole and query_len < sequence.num_unscheduled_tokens:
            return 0  # it has the next step
        if sequence.num_unscored_tokens:
            query_len = min(query_len, self._num_score_rows_left)
            self._num_score_rows_left -= query_len
        start = sequence.num_scheduled_tokens
        query_len = min([query_len, *(end - start for end in sequence.state_ends if end > start)])
        if query_len:
            chunks.append((sequence, query_len))
        return budget - query_len if query_len == sequence.num_unscheduled_tokens else 0

    def _load_blocks(self, sequence: Sequence, budget: int) -> int:
        """Get what is stored of a prompt's next blocks; as many tokens as a step may have.

        Returns:
            How many tokens that were.
        """
        first, size = sequence.num_registered_blocks, self.blocks.block_size
        if sequence.num_unscored_tokens or sequence.num_scheduled_tokens != first * size:
            return 0
        if sequence.request.adapter is not None:  # what adapters make is not stored
            return 0
        table = sequence.block_table
        max_tokens = sequence.num_scheduled_tokens + budget
        keys = self.blocks.find_stored(sequence.token_ids, table[:first], max_tokens)
        if not keys or self.blocks.store is None:
            return 0
        num_loaded = self.blocks.store.load(table[first : first + len(keys)], keys, size) * size
        sequence.num_computed_tokens += num_loaded
        sequence.num_scheduled_tokens += num_loaded
        self._register_full_blocks(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens += num_loaded
            self.num_prefix_hit_tokens += num_loaded
            self.num_offload_hit_tokens += num_loaded
        return num_loaded

    def _plan_states(self, sequence: Sequence, num_known: int) -> None:
        """Choose where the newcomer's state is to be kept: there its chunks end.

        That is after the last full block of its tokens, with which the next turn of a
        conversation begins, and where its beginning parts from those before it, whose blocks are
        known and whose state is not: there others may part from them, too.
        """
        pooling = sequence.params.pooling
        sequence.state_ends = []
        if self.blocks.states is not None and (pooling is None or pooling.can_reuse):
            size = self.blocks.block_size
            ends = {num_known * size, (sequence.num_tokens - 1) // size * size}
            sequence.state_ends = sorted(e for e in ends if e > sequence.num_scheduled_tokens)

    def _keep_states(self, step: Step) -> None:
        """Have states copied that are to be kept after this step, before the next one runs."""
        if self.blocks.states is None:
            return
        for sequence in step.sequences:
            end = sequence.num_scheduled_tokens
            if end in sequence.state_ends and (row := self.blocks.states.reserve()) is not None:
                step.kept_states.append((sequence, end // self.blocks.block_size - 1, row))
                self._state_copies += sequence.row, row

    def _attach_states(self, step: Step) -> None:
        """The blocks at whose ends states were kept in this step are known by now."""
        for sequence, index, row in step.kept_states:
            assert self.blocks.states is not None
            if sequence.finish_reason is None:
                self.blocks.states.attach(sequence.block_table[index], row)
            else:
                self.blocks.states.free(row)

    def _list_reserved_states(self) -> list[int]:
        return [row for step in self._in_flight for *_, row in step.kept_states]

    def _register_full_blocks(self, sequence: Sequence) -> None:
        block_size = self.blocks.block_size
        while (sequence.num_registered_blocks + 1) * block_size <= sequence.num_computed_tokens:
            index = sequence.num_registered_blocks
            tokens = sequence.token_ids[index * block_size : (index + 1) * block_size]
            root = find_root(sequence.request.adapter)
            if self.blocks.register(sequence.block_table, index, tokens, root):
                sequence.num_sent_blocks = min(sequence.num_sent_blocks, index)
                if sequence.drafts is not None:  # a draft model may not have read it
                    sequence.drafts.reading.cut(index * block_size)
            sequence.num_registered_blocks += 1

    def _return_row(self, sequence: Sequence) -> None:
        """Ranks take steps in order, so that the next in the row cannot disturb one in flight."""
        self._free_rows.append(sequence.row)
        sequence.row = NO_ROW

    def _free_leftovers(self, number: int) -> None:
        """Free the blocks that no step after that of this number may write."""
        while self._leftovers and self._leftovers[0][0] <= number:
            _, block_table, forget = self._leftovers.popleft()
            self.blocks.release(block_table, forget=forget)

    def _take_tokens(self, sequence: Sequence, token_ids: list[int]) -> int:
        """Append sampled tokens up to the one with which the sequence ends, if it does.

        Returns:
            How many are part of the completion: none of a sequence that failed.
        """
        num_taken = 0
        for token in token_ids:
            if sequence.finish_reason is not None:
                break
            self._take_token(sequence, token)
            num_taken += 1
        return 0 if sequence.finish_reason == "error" else num_taken

    def _take_token(self, sequence: Sequence, token: int) -> None:
        """Append a sampled token and see whether the sequence ends with it."""
        if token == INVALID_TOKEN:
            return self._fail(sequence, INVALID_NUMBERS)
        sequence.token_ids.append(token)
        is_complete = sequence.guide is not None and sequence.guide.accept(token)
        if sequence.guide is not None and sequence.guide.error is not None:
            sequence.error_code = STRUCTURE_CODE
            return self._fail(sequence, sequence.guide.error)
        if token in sequence.end_token_ids:
            sequence.ends_in_text = False
            return self.finish(sequence, "stop")
        if is_complete:
            return self.finish(sequence, "stop")
        if sequence.num_output_tokens >= sequence.params.max_tokens:
            return self.finish(sequence, "length")
        return None

    def _fail(self, sequence: Sequence, error: str) -> None:
        sequence.error = error
        sequence.ends_in_text = False
        self.finish(sequence, "error")


def _make_queue(policy: str) -> WaitingQueue | PriorityQueue:
    if policy == "fcfs":
        return WaitingQueue()
    return PriorityQueue(is_strict=policy == "strict-priority")
