"""Continuous batching: which sequences run in the next step, and what becomes of them. Rank 0 only.

Iteration-level scheduling after Yu et al. 2022, "Orca"; chunked prefill after Agrawal et al. 2024,
"Sarathi-Serve". First come, first served, in turns between API keys (see `WaitingQueue`).
"""

from __future__ import annotations

import math
import time

from autotp_serving.config import ServingConfig
from autotp_serving.engine.block_manager import BlockManager
from autotp_serving.engine.sequence import Sequence, make_stream
from autotp_serving.engine.step import Step, write_step
from autotp_serving.engine.waiting import WaitingQueue
from autotp_serving.plan import INVALID_TOKEN, MAX_SCORED_ROWS, StepResult
from autotp_serving.request import FinishReason, Request, RequestError

INVALID_NUMBERS = "the model produced invalid numbers (NaN or infinity) for this request"


class Scheduler:
    """Owns the waiting and the running sequences and their pages.

    The running list is in order of admission: that takes the head of the queue, and preemption
    puts the latest back there. So only the latest can be in the middle of its prompt, and
    preempting from the end never hits one that is already planned.

    Args:
        config: limits of a step, prefix caching, seed.
        num_blocks: pages in the pool.
        block_size: tokens a page holds.
        eos_token_ids: tokens that end a text unless the request ignores them.
    """

    def __init__(
        self,
        config: ServingConfig,
        num_blocks: int,
        block_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.blocks = BlockManager(
            num_blocks, block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_arrivals = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._num_score_rows_left = 0
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """True while a sequence runs or waits."""
        return bool(self._sequences)

    def check_fits(self, request: Request) -> None:
        """Refuse what could never run, even alone. Reads constants only: safe in any thread.

        Raises:
            RequestError: prompt and answer need more pages than there are.
        """
        num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
        # The last token of an answer is only given out, it never enters the cache.
        num_kept = max(num_tokens - 1, len(request.prompt_token_ids))
        if self.blocks.num_blocks_for(num_kept) > self.blocks.num_blocks:
            raise RequestError(
                "prompt",
                f"{len(request.prompt_token_ids)} tokens of prompt and up to "
                f"{request.params.max_tokens} of answer do not fit in the KV cache of "
                f"{self.blocks.num_blocks * self.blocks.block_size} tokens",
            )

    def add(self, request: Request) -> Sequence:
        """Queue a request that `check_fits` let pass."""
        stream = make_stream(request.params.seed, self._config.seed, self.num_arrivals)
        eos_token_ids = frozenset() if request.params.ignore_eos else self._eos_token_ids
        sequence = Sequence(request, stream, eos_token_ids.union(request.params.stop_token_ids))
        self.num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> Step | None:
        """Plan the next step, or None when there is nothing to run.

        A sequence whose guide does not know yet what may come next sits the step out, unless there
        is nothing else to do.
        """
        chunks = self._choose_chunks()
        while not chunks and (late := [one for one in self.running if not one.is_ready]):
            late[0].guide.allowed()
            chunks = self._choose_chunks()
        return write_step(chunks, self.blocks.block_size) if chunks else None

    def _choose_chunks(self) -> list[tuple[Sequence, int]]:
        """Sequences that run next, each with how many of its tokens."""
        budget = self._config.max_num_batched_tokens
        chunks: list[tuple[Sequence, int]] = []
        # An answer's next token goes first, so a long prompt never stops those that stream.
        # Preemption shortens the list at its end while this loop walks towards it.
        for sequence in self.running:
            is_next = sequence.num_uncomputed_tokens == 1 and sequence.is_ready
            if is_next and self._make_room(sequence):
                chunks.append((sequence, 1))
                budget -= 1
        self._num_score_rows_left = MAX_SCORED_ROWS
        if self.running and self.running[-1].num_uncomputed_tokens > 1:
            budget = self._add_prefill(chunks, self.running[-1], budget)
        while budget > 0 and (sequence := self._admit()):
            budget = self._add_prefill(chunks, sequence, budget)
        return chunks

    def update(self, step: Step, result: StepResult) -> None:
        """Take in what the runner returned.

        Sequences that are done get their `finish_reason` and give back their pages.
        """
        for sequence, query_len in zip(step.sequences, step.plan.query_lens, strict=True):
            sequence.num_computed_tokens += query_len
            self._register_full_blocks(sequence)
        for sequence, logprobs in zip(step.scored, result.scores, strict=True):
            sequence.prompt_logprobs.extend(logprobs)
            if any(math.isnan(one.logprob) for one in logprobs):
                self._fail(sequence, INVALID_NUMBERS)
        for sequence, token in zip(step.sampled, result.token_ids, strict=True):
            if sequence.finish_reason is None:
                self._take_token(sequence, token)
        for sequence in step.read:
            if sequence.finish_reason is None:
                self.finish(sequence, "length")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is: the one way out, its pages are available at once."""
        assert sequence.finish_reason is None
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        # After numbers that are not finite, its pages may be what is broken.
        self.blocks.release(sequence.block_table, forget=reason == "error")

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """End a request by its id; None when there is no such request (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence, reason)
        return sequence

    def check_integrity(self) -> None:
        """Audit lists and pages against each other. Raises AssertionError."""
        sequences = [*self.running, *self.waiting]
        assert self._sequences == {seq.request_id: seq for seq in sequences}
        for seq in self.waiting:
            assert not seq.block_table, f"{seq.request_id} waits and holds pages"
            assert seq.num_computed_tokens == seq.num_registered_blocks == 0
        for seq in self.running:
            assert seq.num_computed_tokens < seq.num_tokens
            assert self.blocks.num_blocks_for(seq.num_computed_tokens) <= len(seq.block_table)
            num_full_blocks = seq.num_computed_tokens // self.blocks.block_size
            assert seq.num_registered_blocks == num_full_blocks
        self.blocks.check_integrity(seq.block_table for seq in self.running)

    def _make_room(self, sequence: Sequence) -> bool:
        """Get pages for one more token, at the cost of later ones; False if it had to go."""
        while not self.blocks.grow(sequence.block_table, sequence.num_tokens):
            if self._preempt() is sequence:
                return False
        return True

    def _preempt(self) -> Sequence:
        """Send the latest back to the head of the queue, to be computed anew."""
        victim = self.running.pop()
        self.blocks.release(victim.block_table)
        victim.num_computed_tokens = 0
        victim.num_registered_blocks = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(victim)
        return victim

    def _admit(self) -> Sequence | None:
        """Move the head of the queue into the running list with all pages it needs by now."""
        if not self.waiting or len(self.running) >= self._config.max_num_seqs:
            return None
        sequence = self.waiting.head
        matched = self.blocks.match(sequence.token_ids)
        if sequence.num_unscored_tokens:  # tokens taken from the cache would give no logits
            del matched[len(sequence.prompt_logprobs) // self.blocks.block_size :]
        # One page stays for each that runs, or the newcomer would soon be preempted for it.
        num_needed = self.blocks.num_needed(sequence.num_tokens, matched) + len(self.running)
        if num_needed > self.blocks.num_available:
            return None
        self.running.append(self.waiting.pop())
        self.blocks.take(sequence.block_table, matched)
        self.blocks.grow(sequence.block_table, sequence.num_tokens)
        sequence.num_registered_blocks = len(matched)
        sequence.num_computed_tokens = len(matched) * self.blocks.block_size
        if sequence.num_preemptions == 0:
            sequence.queue_seconds = time.monotonic() - sequence.request.arrival_time
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_query_tokens += sequence.num_tokens
            self.num_prefix_hit_tokens += sequence.num_computed_tokens
        return sequence

    def _add_prefill(
        self, chunks: list[tuple[Sequence, int]], sequence: Sequence, budget: int
    ) -> int:
        """Plan as much of a prompt as the step allows.

        Returns:
            Tokens left for others: none, unless the prompt is complete, because only the last in
            the running list may be in the middle of one.
        """
        query_len = min(budget, sequence.num_uncomputed_tokens)
        if sequence.num_unscored_tokens:
            query_len = min(query_len, self._num_score_rows_left)
            self._num_score_rows_left -= query_len
        if query_len:
            chunks.append((sequence, query_len))
        return budget - query_len if query_len == sequence.num_uncomputed_tokens else 0

    def _register_full_blocks(self, sequence: Sequence) -> None:
        block_size = self.blocks.block_size
        while (sequence.num_registered_blocks + 1) * block_size <= sequence.num_computed_tokens:
            index = sequence.num_registered_blocks
            tokens = sequence.token_ids[index * block_size : (index + 1) * block_size]
            self.blocks.register(sequence.block_table, index, tokens)
            sequence.num_registered_blocks += 1

    def _take_token(self, sequence: Sequence, token: int) -> None:
        """Append a sampled token and see whether the sequence ends with it."""
        if token == INVALID_TOKEN:
            return self._fail(sequence, INVALID_NUMBERS)
        sequence.token_ids.append(token)
        is_complete = sequence.guide is not None and sequence.guide.accept(token)
        if sequence.guide is not None and sequence.guide.error is not None:
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
