"""Stand-ins for model and tokenizer, so that the whole control side runs in seconds without torch.

`FakeRunner` keeps a real paged memory and checks every read, so a wrong slot, block table or stale
page fails the test that caused it. Its default model answers any prompt with letters that depend
on every token before them: `generate` computes the same text without pages, as the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from autotp_serving.plan import MAX_SCORED_ROWS, SampleInput, ScoreInput, StepPlan, StepResult
from autotp_serving.request import TokenLogprobs
from autotp_serving.step_times import RankTimes

NextToken = Callable[[list[int], SampleInput], int]


class ByteTokenizer:
    """One token per UTF-8 byte, and one that ends the text."""

    EOS = 256

    def __init__(self) -> None:
        self.eos_token_ids = self.special_token_ids = frozenset({self.EOS})
        self.vocab_size = 257
        self.chat_template = ""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The UTF-8 bytes of the text. Raises UnicodeEncodeError for a lone surrogate."""
        return list(text.encode("utf-8"))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """A line "role: content" for each message, and the beginning of the answer's."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        lines[:0] = [f"tool {tool['function']['name']}\n" for tool in options.get("tools", ())]
        if options.get("add_generation_prompt"):
            lines.append("assistant: ")
        return self.encode("".join(lines))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the bytes; the end token is "<end>", incomplete bytes appear as U+FFFD."""
        if skip_special_tokens:
            token_ids = [token for token in token_ids if token < self.EOS]
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or the end token's name."""
        return bytes([token_id]) if token_id < self.EOS else b"<end>"


def letters(context: list[int], sample: SampleInput) -> int:
    """A lower-case letter that depends on all tokens so far and, unless greedy, on the draw."""
    draw = 0 if sample.params.is_greedy else int(sample.uniform * 2**20)
    return ord("a") + hash((*context, draw)) % 26


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
    """One token per sample, as a runner must produce them: the reference without any pages."""
    context = list(prompt)
    for sample in samples:
        context.append(next_token(context, sample))
    return context[len(prompt) :]


class FakeRunner:
    """Obeys plans as a model would, and asserts that each plan and each page it reads is right.

    A slot remembers (position, token, chain), where the chain depends on all tokens before: as
    real keys and values do. Old context is read before anything is written, so a page that is
    shared before the step that fills it has run is caught too.

    Args:
        num_blocks: pages in the pool.
        block_size: tokens a page holds.
        next_token: the model: (context, sample) -> token id; -1 stands for NaN logits.
        delay: seconds each step takes.
        fail_at_step: raise RuntimeError in the step of this index, from 0.
        vocab_size: tokens that the model has rows for; others must not reach it.
    """

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
        self.plans: list[StepPlan] = []
        self.rank_times = [RankTimes(), RankTimes()]
        self.samples: list[SampleInput] = []
        self.kept: set[str] = set()  # requests sampled and not released
        self._memory: list[tuple[int, int, int] | None] = [None] * (num_blocks * block_size)

    def execute(
        self,
        plan: StepPlan,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
    ) -> StepResult:
        """Check the plan, write its tokens into the pages, choose and score."""
        if len(self.plans) == self.fail_at_step:
            raise RuntimeError("rank 1 is gone")
        if self.delay:
            time.sleep(self.delay)
        assert StepPlan.from_bytes(plan.to_bytes()) == plan, "the plan does not survive the wire"
        self.plans.append(plan)
        self.samples.extend(samples)
        times = RankTimes(len(self.plans), 0.5 * len(self.plans), 2 * len(self.plans), 4096, 0.25)
        self.rank_times = [times, times]
        self._check_shape(plan, samples, scores)
        self._check_tokens(plan, samples, scores)
        contexts = [
            self._read(table, context_len - query_len)
            for table, context_len, query_len in zip(
                plan.block_tables, plan.context_lens, plan.query_lens, strict=True
            )
        ]
        chosen: dict[int, list[int]] = {}
        row = 0
        for table, query_len, (tokens, chain) in zip(
            plan.block_tables, plan.query_lens, contexts, strict=True
        ):
            for index in range(row, row + query_len):
                position, token = plan.positions[index], plan.token_ids[index]
                assert position == len(tokens), f"position {position}, expected {len(tokens)}"
                assert plan.slots[index] == self._slot(table, position), "token in a wrong slot"
                chain = hash((chain, token))
                tokens.append(token)
                self._memory[plan.slots[index]] = (position, token, chain)
                if index in plan.logit_rows:
                    chosen[index] = list(tokens)
            row += query_len
        rows = iter(plan.logit_rows)
        result = StepResult([], [], [])
        for sample in samples:
            context = chosen[next(rows)]
            if sample.params.has_penalties:
                assert list(sample.token_ids) == context, "penalties see other tokens"
            token = obey(self.next_token(context, sample), sample)
            num_top = sample.params.logprobs
            result.token_ids.append(token)
            result.logprobs.append(None if num_top is None else logprobs(context, token, num_top))
            self.kept.add(sample.request_id)
        for score in scores:
            contexts = [chosen[next(rows)] for _ in score.target_ids]
            for context, following in pairwise(contexts):
                assert following[:-1] == context, "rows of one score out of order"
            result.scores.append(
                [
                    logprobs(context, target, score.num_top)
                    for context, target in zip(contexts, score.target_ids, strict=True)
                ]
            )
        return result

    def release(self, request_id: str) -> None:
        """Forget a request."""
        self.kept.discard(request_id)

    def _check_shape(
        self, plan: StepPlan, samples: Sequence[SampleInput], scores: Sequence[ScoreInput]
    ) -> None:
        num_tokens = len(plan.token_ids)
        assert num_tokens > 0, "an empty step"
        assert len(plan.positions) == len(plan.slots) == sum(plan.query_lens) == num_tokens
        assert len(plan.query_lens) == len(plan.context_lens) == len(plan.block_tables)
        assert min(plan.query_lens) >= 1
        assert len(set(plan.slots)) == num_tokens, "two tokens in one slot"
        num_scored = sum(len(score.target_ids) for score in scores)
        assert len(plan.logit_rows) == len(samples) + num_scored
        assert num_scored <= MAX_SCORED_ROWS, "more logits than there is memory for"
        assert all(0 <= row < num_tokens for row in plan.logit_rows)
        for table, context_len in zip(plan.block_tables, plan.context_lens, strict=True):
            assert len(table) == -(-context_len // self.block_size), "table does not fit context"
            assert len(set(table)) == len(table), "a page twice in one table"
            assert all(0 <= block < self.num_blocks for block in table)

    def _check_tokens(
        self, plan: StepPlan, samples: Sequence[SampleInput], scores: Sequence[ScoreInput]
    ) -> None:
        tokens = list(plan.token_ids)
        for sample in samples:
            tokens += [*sample.params.logit_bias, *sample.token_ids]
            if sample.allowed is not None:
                tokens.append(max(0, int.from_bytes(sample.allowed, "little").bit_length() - 1))
        for score in scores:
            tokens += score.target_ids
        assert all(type(token) is int for token in tokens), "a token that is no number"
        assert min(tokens) >= 0 and max(tokens) < self.vocab_size, "a token without a row"

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _read(self, table: list[int], context_len: int) -> tuple[list[int], int]:
        """Tokens of the context and their chain, read back through the pages."""
        tokens: list[int] = []
        chain = 0
        for position in range(context_len):
            entry = self._memory[self._slot(table, position)]
            assert entry is not None, f"page read at position {position} before it was written"
            chain = hash((chain, entry[1]))
            assert entry == (position, entry[1], chain), f"stale page at position {position}"
            tokens.append(entry[1])
        return tokens, chain
