"""Stand-ins for model and tokenizer, so that the whole control side runs in seconds without torch.

`FakeRunner` keeps rows and a real paged memory and checks every read, so a wrong row, block table
or stale block fails the test that caused it, with one step in flight or two. Its default model
answers any prompt with letters that depend on every token before them: `generate` computes the
same text without blocks, as the reference.
"""

from __future__ import annotations

import itertools
import math
import operator
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from autotp_serving.batch import (
    MAX_SCORED_ROWS,
    Batch,
    DraftInput,
    PoolInput,
    SampleInput,
    ScoreInput,
    StepResult,
)
from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.request import AdapterError, SamplingParams, TokenLogprobs
from autotp_serving.step_times import RankTimes

NextToken = Callable[[list[int], SampleInput], int]


class ByteTokenizer:
    """One token per UTF-8 byte, and one that ends the text."""

    EOS = 256

    def __init__(self) -> None:
        self.eos_token_ids = self.special_token_ids = frozenset({self.EOS})
        self.vocab_size = 257
        self.chat_template = ""
        self.template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The UTF-8 bytes of the text. Raises UnicodeEncodeError for a lone surrogate."""
        return list(text.encode("utf-8"))

    def encode_pair(self, text: str, other: str) -> list[int]:
        """Both, with the end token between."""
        return [*self.encode(text), self.EOS, *self.encode(other)]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """A line "role: content" for each message, and the beginning of the completion's."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        lines[:0] = [f"tool {tool['function']['name']}\n" for tool in options.get("tools", ())]
        if options.get("add_generation_prompt"):
            lines.append("assistant: ")
        return "".join(lines)

    def check_chat(self, options: Mapping[str, Any]) -> None:
        """Every option will do."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the bytes; the end token is "<end>", incomplete bytes appear as U+FFFD."""
        if skip_special_tokens:
            token_ids = [token for token in token_ids if token < self.EOS]
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or the end token's name."""
        return bytes([token_id]) if token_id < self.EOS else b"<end>"


def letters(context: list[int], sample: SampleInput) -> int:
    """A lower-case letter that depends on all tokens so far and, unless greedy, on the sample."""
    first_uniform = 0 if sample.params.is_greedy else int(sample.uniform * 2**20)
    return ord("a") + hash((*context, first_uniform)) % 26


def answers(book: Mapping[str, str]) -> NextToken:
    """A model of `ByteTokenizer` that answers known prompts, then ends; others get `letters`."""
    scripts = [(list(p.encode()), [*a.encode(), ByteTokenizer.EOS]) for p, a in book.items()]

    def next_token(context: list[int], sample: SampleInput) -> int:
        for prompt, script in scripts:
            done = context[len(prompt) :]
            if context[: len(prompt)] == prompt and done[: len(script)] == script[: len(done)]:
                return script[len(done)] if len(done) < len(script) else ByteTokenizer.EOS
        return letters(context, sample)

    return next_token


def logprob(context: Sequence[int], token: int) -> float:
    """A made-up logprob of a token that depends on all tokens before it."""
    return -1.0 - hash((*context, token)) % 1000 / 1000


def logprobs(context: Sequence[int], token: int, num_top: int) -> TokenLogprobs:
    """The same with the likeliest tokens there: the token itself, then letters from "a" on."""
    others = [letter for letter in range(97, 123) if letter != token]
    top = [(token, logprob(context, token))]
    top += [(letter, -3.0 - rank) for rank, letter in enumerate(others)]
    return TokenLogprobs(token, logprob(context, token), tuple(top[:num_top]))


def obey(token: int, sample: SampleInput) -> int:
    """The token, or another one where a mask or a ban forbids it, or a bias of 100 decides."""
    if token in sample.banned:
        token = ord("z")
    if 100.0 in sample.params.logit_bias.values():
        token = next(key for key, bias in sample.params.logit_bias.items() if bias == 100.0)
    if sample.allowed is None or token < 0:
        return token
    bits = int.from_bytes(sample.allowed, "little")
    if bits >> token & 1:
        return token
    allowed = [number for number in range(bits.bit_length()) if bits >> number & 1]
    return allowed[int(sample.uniform * len(allowed))]


def generate(
    prompt: Sequence[int], samples: Sequence[SampleInput], next_token: NextToken = letters
) -> list[int]:
    """One token per sample, as a runner must produce them: the reference without any blocks."""
    context = list(prompt)
    for sample in samples:
        context.append(next_token(context, sample))
    return context[len(prompt) :]


class FakeRunner:
    """Runs batches as a model would, and asserts that each batch and each block it reads is right.

    A slot remembers (position, token, chain), where the chain depends on all tokens before: as
    real keys and values do. Old context is read before anything is written, so a block that is
    shared before the step that fills it has run is caught too; so is a block that is handed on
    while a step in flight may write it, and a token that is not sent and not in flight. With
    `has_states`, a row holds the chain of its sequence too, which must be that of the blocks.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block holds.
        next_token: the model: (context, sample) -> token id; -1 stands for NaN logits.
        delay: seconds each step takes.
        fail_at_step: raise RuntimeError in the step of this index, from 0.
        vocab_size: tokens that the model has rows for; others must not reach it.
    """

    has_states = False  # tests set it, here or on one runner
    can_draft = False  # tests that want drafts set it
    max_in_flight = 1  # tests set it to 2, here or on one runner

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 16,
        *,
        next_token: NextToken = letters,
        delay: float = 0.0,
        fail_at_step: int | None = None,
        vocab_size: int = 2**31,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.next_token = next_token
        self.delay = delay
        self.fail_at_step = fail_at_step
        self.batches: list[Batch] = []
        self.rank_times = [RankTimes(), RankTimes()]
        self.samples: list[SampleInput] = []
        self.kept: set[str] = set()  # requests sampled and not released
        self.adapters: dict[int, str] = {}  # folders by slot; chains and answers depend on them
        self.pools = False  # what `score_rows` are for
        self.vector_size = 3
        self._sums: dict[str, Sequence[float]] = {}
        self._memory: list[tuple[int, int, int] | None] = [None] * (num_blocks * block_size)
        self._draft_memory = list(self._memory)  # of the draft model
        self._tables: dict[int, list[int]] = {}  # by row
        self._last_tokens: dict[int, int] = {}
        self._states: dict[int, int] = {}  # by row
        self.stored_blocks: Sequence[tuple[int, bytes]] = ()  # tests give some slots
        self.files: dict[int, tuple[bytes, list[tuple[int, int, int]]]] = {}  # by slot
        self.damaged: set[int] = set()  # slots
        self._forwarded: tuple[Batch, dict[int, list[int]]] | None = None
        # Of each step in flight: its result, rows that got a token, the blocks it writes by row.
        self._in_flight: deque[tuple[StepResult, set[int], dict[int, int]]] = deque()

    def forward(self, batch: Batch) -> None:
        """Check the batch and write its tokens into the blocks."""
        if len(self.batches) == self.fail_at_step:
            raise RuntimeError("rank 1 is gone")
        if self.delay:
            time.sleep(self.delay)
        assert self._forwarded is None, "the step before was not sampled"
        assert len(self._in_flight) < self.max_in_flight, "too many steps in flight"
        assert Batch.from_bytes(batch.to_bytes()) == batch, "the batch does not survive the wire"
        self.batches.append(batch)
        num_steps = len(self.batches)
        self.rank_times = [RankTimes(num_steps, 0.5 * num_steps, 2 * num_steps, 4096, 0.25)] * 2
        self._check_shape(batch)
        self._grow_tables(batch)
        token_ids = self._complete_tokens(batch)
        self._check_rows(token_ids)
        tables = [self._tables[row] for row in batch.rows]
        slots = batch.adapters or [0] * batch.num_seqs
        self._markers = [hash(self.adapters[slot]) if slot else 0 for slot in slots]
        contexts = [
            self._read(table, start, marker)
            for table, start, marker in zip(tables, batch.starts, self._markers, strict=True)
        ]
        copies = iter(batch.state_copies)
        for source, target in zip(copies, copies, strict=True):
            self._states[target] = self._states[source]
        for row, (tokens, chain) in zip(batch.rows, contexts, strict=True):
            is_right = not (self.has_states and tokens) or self._states[row] == chain
            assert is_right, f"row {row} has the state of another beginning"
        seen: dict[int, list[int]] = {}  # by flattened token, what its logits come from
        ends: list[int] = []
        written: set[int] = set()
        index = 0
        for row, table, query_len, (tokens, chain) in zip(
            batch.rows, tables, batch.query_lens, contexts, strict=True
        ):
            for token in token_ids[index : index + query_len]:
                slot = self._slot(table, len(tokens))
                assert slot not in written, "two tokens in one slot"
                written.add(slot)
                chain = hash((chain, token))
                self._memory[slot] = (len(tokens), token, chain)
                tokens.append(token)
                seen[index] = list(tokens)
                index += 1
            ends.append(index - 1)
            self._states[row] = chain
        self._forwarded = (batch, seen)
        self._ends, self._written = ends, written

    def sample(
        self,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
        pools: Sequence[PoolInput] = (),
    ) -> None:
        """Choose and score; the tokens wait in the rows, the result until it is collected."""
        assert self._forwarded is not None, "nothing was forwarded"
        (batch, seen), self._forwarded = self._forwarded, None
        self.samples.extend(samples)
        self._check_tokens(samples, scores)
        result = StepResult([], [], [], [])
        inputs = iter(samples)
        for index in batch.sampled:
            tokens: list[int] = []
            found: list[TokenLogprobs] = []
            num_drafts = batch.num_drafts[index] if batch.num_drafts else 0
            drawn = [next(inputs) for _ in range(num_drafts + 1)]
            for ahead, sample in enumerate(drawn, start=-num_drafts):
                context = seen[self._ends[index] + ahead]
                if tokens and tokens[-1] != context[-1]:
                    break  # the draft is refused
                if sample.params.has_penalties:
                    assert [*sample.token_ids, *sample.drafts] == context, (
                        "penalties see other tokens"
                    )
                marker = self._markers[index]
                seen_by_model = [marker, *context] if marker else context
                token = obey(self.next_token(seen_by_model, sample), sample)
                if token < 0 and tokens:
                    break  # the next step shall say so
                tokens.append(token)
                if sample.params.logprobs is not None:
                    found.append(logprobs(context, token, sample.params.logprobs))
            result.token_ids.append(tokens)
            result.logprobs.append(found or None)
            self.kept.add(drawn[0].request_id)
            self._last_tokens[batch.rows[index]] = max(0, tokens[-1])
        assert next(inputs, None) is None, "a sample too many"
        rows = iter(batch.score_rows)
        for score in scores:
            contexts = [seen[next(rows)] for _ in score.target_ids]
            for context, following in pairwise(contexts):
                assert following[:-1] == context, "rows of one score out of order"
            result.scores.append(
                [
                    logprobs(context, target, score.num_top)
                    for context, target in zip(contexts, score.target_ids, strict=True)
                ]
            )
        result.pooled.extend(self._pool(pool, seen, rows) for pool in pools)
        assert next(rows, None) is None, "a row that nobody scores"
        sampled = {batch.rows[index] for index in batch.sampled}
        writers = {}
        for row, start, query_len in zip(batch.rows, batch.starts, batch.query_lens, strict=True):
            first, last = start // self.block_size, (start + query_len - 1) // self.block_size
            writers |= dict.fromkeys(self._tables[row][first : last + 1], row)
        self._in_flight.append((result, sampled, writers))

    def collect(self) -> StepResult:
        """The oldest step's result."""
        return self._in_flight.popleft()[0]

    def transfer(self, transfer: BlockTransfer) -> list[int]:
        """Move blocks between memory and the files, which hold only what was written."""
        assert BlockTransfer.from_bytes(transfer.to_bytes()) == transfer
        for slot in transfer.drops:
            del self.files[slot]
        for block, slot, key in transfer.stores:
            entries = [one for one in self._memory[self._slots_of(block)] if one is not None]
            assert len(entries) == self.block_size, f"block {block} is stored and not full"
            self.files[slot] = key, entries
            self.damaged.discard(slot)
        failed = []
        for index, (block, slot, key) in enumerate(transfer.loads):
            held, entries = self.files.get(slot, (b"", []))
            if held != key or slot in self.damaged:
                self.files.pop(slot, None)
                failed.append(index)
            else:
                self._memory[self._slots_of(block)] = entries
        return failed

    def _slots_of(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)

    def draft(self, batch: Batch, drafts: Sequence[DraftInput]) -> list[list[int]]:
        """Guess as the model does, and wrong now and then; reads nothing that was not written."""
        assert not self._in_flight and self._forwarded is None, "a step is under way"
        assert Batch.from_bytes(batch.to_bytes()) == batch, "the batch does not survive the wire"
        assert batch.num_known == batch.query_lens
        self._grow_tables(batch)
        known = iter(batch.token_ids)
        contexts = []
        for row, start, query_len in zip(batch.rows, batch.starts, batch.query_lens, strict=True):
            table = self._tables[row]
            tokens, chain = self._read(table, start, 0, self._draft_memory)
            contexts.append((table, tokens))
            for _ in range(query_len):
                chain = self._read_as_draft(table, tokens, next(known), chain)
        found = []
        for index, draft in zip(batch.sampled, drafts, strict=True):
            table, tokens = contexts[index]
            chain = self._draft_memory[self._slot(table, len(tokens) - 1)][2]
            params = SamplingParams(temperature=draft.temperature)
            guesses: list[int] = []
            for uniform in draft.uniforms:
                if guesses:
                    chain = self._read_as_draft(table, tokens, guesses[-1], chain)
                guess = self.next_token(tokens, SampleInput(params, uniform))
                if guess < 0 or hash((*tokens, 7)) % 4 == 0:
                    guess = ord("x")
                guesses.append(guess)
            found.append(guesses)
        return found

    def _read_as_draft(self, table: list[int], tokens: list[int], token: int, chain: int) -> int:
        chain = hash((chain, token))
        self._draft_memory[self._slot(table, len(tokens))] = (len(tokens), token, chain)
        tokens.append(token)
        return chain

    def load_adapter(self, slot: int, path: str) -> None:
        """Any folder but "bad" will do."""
        assert not self._in_flight, "a step is in flight"
        if path == "bad":
            raise AdapterError("it is no adapter")
        self.adapters[slot] = path

    def drop_adapter(self, slot: int) -> None:
        """Forget it."""
        del self.adapters[slot]

    def release(self, request_id: str) -> None:
        """Forget a request."""
        self.kept.discard(request_id)
        self._sums.pop(request_id, None)

    def _pool(
        self, pool: PoolInput, seen: dict[int, list[int]], rows: Iterator[int]
    ) -> bytes | None:
        """How many tokens a row has seen, their last and their sum; or the mean of several rows."""
        vectors = [
            (len(seen[row]), seen[row][-1], sum(seen[row]))
            for row in itertools.islice(rows, pool.num_rows)
        ]
        before = self._sums.pop(pool.request_id, (0, 0, 0))
        total = [sum(column) for column in zip(before, *vectors, strict=True)]
        if not pool.is_last:
            self._sums[pool.request_id] = total
            return None
        if pool.pooling.method == "mean":
            total = [one / pool.num_tokens for one in total]
        total = total[: pool.pooling.dimensions or self.vector_size]
        length = math.hypot(*total) if pool.pooling.normalize else 1.0
        return array("f", [one / length for one in total]).tobytes()

    def _check_shape(self, batch: Batch) -> None:
        num_seqs = batch.num_seqs
        assert num_seqs > 0, "an empty step"
        assert len(set(batch.rows)) == num_seqs, "two sequences in one row"
        assert len(batch.starts) == len(batch.query_lens) == len(batch.num_known) == num_seqs
        assert min(batch.query_lens) >= 1 and min(batch.starts) >= 0
        assert sum(batch.num_known) == len(batch.token_ids)
        if batch.num_drafts:
            assert self.can_draft and len(batch.num_drafts) == num_seqs
            assert all(map(operator.lt, batch.num_drafts, batch.query_lens))
            assert batch.num_known == batch.query_lens, "what drafts follow must be known"
            assert batch.num_samples - len(batch.sampled) <= MAX_SCORED_ROWS
        assert batch.sampled == sorted(set(batch.sampled))
        assert all(0 <= index < num_seqs for index in batch.sampled)
        if not self.pools:
            assert len(batch.score_rows) <= MAX_SCORED_ROWS, "more logits than there is memory for"
        assert all(0 <= row < sum(batch.query_lens) for row in batch.score_rows)

    def _grow_tables(self, batch: Batch) -> None:
        """Take the new blocks into the rows' tables, which must then cover the contexts."""
        new_blocks = iter(batch.new_blocks)
        for index, first, count in zip(
            batch.grown, batch.first_blocks, batch.num_new_blocks, strict=True
        ):
            row = batch.rows[index]
            blocks = [next(new_blocks) for _ in range(count)]
            for *_, writers in self._in_flight:
                strangers = [block for block in blocks if writers.get(block, row) != row]
                assert not strangers, f"blocks {strangers} may still be written by another row"
            table = self._tables.setdefault(row, [])
            assert first <= len(table), "a gap in a table"
            table[first:] = blocks
        assert next(new_blocks, None) is None, "blocks that belong to nobody"
        for row, start, query_len in zip(batch.rows, batch.starts, batch.query_lens, strict=True):
            table = self._tables[row]
            assert len(table) >= -(-(start + query_len) // self.block_size), "a table is too short"
            assert len(set(table)) == len(table), "a block twice in one table"
            assert all(0 <= block < self.num_blocks for block in table)

    def _complete_tokens(self, batch: Batch) -> list[int]:
        """The flattened tokens, those that the engine does not know yet taken from the rows."""
        known = iter(batch.token_ids)
        token_ids: list[int] = []
        for row, query_len, num_known in zip(
            batch.rows, batch.query_lens, batch.num_known, strict=True
        ):
            assert query_len - 1 <= num_known <= query_len
            token_ids.extend(next(known) for _ in range(num_known))
            if num_known < query_len:
                assert any(row in sampled for _, sampled, _ in self._in_flight), (
                    f"row {row} has no token in flight"
                )
                token_ids.append(self._last_tokens[row])
        return token_ids

    def _check_tokens(self, samples: Sequence[SampleInput], scores: Sequence[ScoreInput]) -> None:
        tokens = [0]
        for sample in samples:
            tokens += [*sample.params.logit_bias, *sample.token_ids]
            if sample.allowed is not None:
                tokens.append(max(0, int.from_bytes(sample.allowed, "little").bit_length() - 1))
        for score in scores:
            tokens += score.target_ids
        self._check_rows(tokens)

    def _check_rows(self, tokens: Sequence[int]) -> None:
        assert all(type(token) is int for token in tokens), "a token that is no number"
        assert min(tokens) >= 0 and max(tokens) < self.vocab_size, "a token without a row"

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _read(
        self,
        table: list[int],
        context_len: int,
        chain: int,
        memory: list[tuple[int, int, int] | None] | None = None,
    ) -> tuple[list[int], int]:
        """Tokens of the context and their chain, read back through the blocks."""
        tokens: list[int] = []
        for position in range(context_len):
            entry = (memory or self._memory)[self._slot(table, position)]
            assert entry is not None, f"block read at position {position} before it was written"
            chain = hash((chain, entry[1]))
            assert entry == (position, entry[1], chain), f"stale block at position {position}"
            tokens.append(entry[1])
        return tokens, chain
