"""Change logits before temperature: structured output, bans, bias, penalties. Rank 0 only.

Semantics and order are vLLM's: the frequency and presence penalties look at the completion alone,
the repetition penalty at prompt and completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from autotp_serving.batch import SampleInput

NEVER = float("-inf")


class LogitsProcessors:
    """Changes the logits of a step: each kind of change is one operation over the rows it concerns.

    What a request needs from step to step lies on the device, until `release`.
    """

    def __init__(self) -> None:
        self._counts: TokenCounts | None = None
        self._biases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def apply(self, logits: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
        """Process logits, [num_rows, vocab_size] in float32, which are overwritten."""
        guided = [row for row, sample in enumerate(samples) if sample.allowed is not None]
        if guided:
            keep_allowed(logits, guided, [samples[row].allowed for row in guided])
        if any(sample.banned for sample in samples):
            self._ban(logits, samples)
        if any(sample.params.logit_bias for sample in samples):
            self._add_bias(logits, samples)
        penalized = [row for row, sample in enumerate(samples) if sample.params.has_penalties]
        if penalized:
            if self._counts is None:
                self._counts = TokenCounts(logits.shape[-1], logits.device)
            picked = [samples[row] for row in penalized]
            index = torch.tensor(penalized, device=logits.device)
            logits[index] = penalize(logits[index], picked, *self._counts.update(picked))
        return logits

    def release(self, request_id: str) -> None:
        """Forget a request."""
        self._biases.pop(request_id, None)
        if self._counts is not None:
            self._counts.release(request_id)

    @staticmethod
    def _ban(logits: torch.Tensor, samples: Sequence[SampleInput]) -> None:
        # An end token of the tokenizer may lie beyond the model's vocabulary.
        pairs = [
            (row, token)
            for row, sample in enumerate(samples)
            for token in sample.banned
            if token < logits.shape[-1]
        ]
        rows, tokens = torch.tensor(pairs, device=logits.device).view(-1, 2).unbind(1)
        logits[rows.long(), tokens.long()] = NEVER

    def _add_bias(self, logits: torch.Tensor, samples: Sequence[SampleInput]) -> None:
        rows, tokens, values = [], [], []
        for row, sample in enumerate(samples):
            if sample.params.logit_bias:
                bias = self._bias_of(sample, logits.device)
                rows.append(torch.full_like(bias[0], row))
                tokens.append(bias[0])
                values.append(bias[1])
        where = (torch.cat(rows), torch.cat(tokens))
        logits[where] += torch.cat(values)

    def _bias_of(
        self, sample: SampleInput, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._biases.get(sample.request_id)
        if known is None:
            bias = sample.params.logit_bias
            known = self._biases[sample.request_id] = (
                torch.tensor(list(bias), device=device),
                torch.tensor(list(bias.values()), dtype=torch.float32, device=device),
            )
        return known


def keep_allowed(logits: torch.Tensor, rows: list[int], masks: list[Any]) -> None:
    """Set the logits of all tokens that a row's mask does not allow to minus infinity."""
    # `index_select` takes a fraction of the time of `[]` on a CPU.
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).to(logits.device)
    forbidden = _bits_not_set(logits.device).index_select(0, packed.int()).view(torch.bool)
    forbidden = forbidden.view(len(rows), -1)[:, : logits.shape[1]]
    # The model's vocabulary may be padded beyond the tokenizer's, which made the mask.
    if num_missing := logits.shape[1] - forbidden.shape[1]:
        forbidden = nn.functional.pad(forbidden, (0, num_missing), value=True)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, NEVER)
        return
    index = torch.tensor(rows, device=logits.device)
    logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(forbidden, NEVER))


@cache
def _bits_not_set(device: torch.device) -> torch.Tensor:
    """[256], for each byte eight booleans in one number: which of its bits are 0, lowest first.

    One number, because that is looked up sooner than eight elements.
    """
    byte = torch.arange(256, device=device)[:, None]
    is_0 = byte >> torch.arange(8, device=device) & 1 == 0
    return is_0.view(torch.int64).flatten()


def penalize(
    logits: torch.Tensor,
    samples: Sequence[SampleInput],
    counts: torch.Tensor,
    is_present: torch.Tensor,
) -> torch.Tensor:
    """Apply the three penalties.

    Args:
        logits: [num_rows, vocab_size].
        counts: [num_rows, vocab_size], how often each token is in the completion.
        is_present: [num_rows, vocab_size], True for tokens in prompt or completion.
    """

    def column(name: str, off: float) -> torch.Tensor | None:
        values = [getattr(sample.params, name) for sample in samples]
        if all(value == off for value in values):
            return None
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    if (repetition := column("repetition_penalty", 1.0)) is not None:
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(is_present, repeated, logits)
    if (frequency := column("frequency_penalty", 0.0)) is not None:
        logits = logits - frequency * counts
    if (presence := column("presence_penalty", 0.0)) is not None:
        logits = logits - presence * (counts > 0)
    return logits


class TokenCounts:
    """Which tokens each request has had so far, in tables on the device with a row per request.

    A step adds the tokens that are new: the whole prompt once, then one token at a time.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._is_present = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._rows: dict[str, int] = {}
        self._num_counted: dict[str, int] = {}
        self._free_rows: list[int] = []

    @property
    def num_requests(self) -> int:
        """Requests that have a row."""
        return len(self._rows)

    def update(self, samples: Sequence[SampleInput]) -> tuple[torch.Tensor, torch.Tensor]:
        """Count what is new; returns the counts in the completion, and what is present at all.

        Drafts count for their own sample alone.
        """
        rows = [self._row_of(sample.request_id) for sample in samples]
        present: tuple[list[int], list[int]] = [], []
        generated: tuple[list[int], list[int]] = [], []
        for row, sample in zip(rows, samples, strict=True):
            start = self._num_counted[sample.request_id]
            self._num_counted[sample.request_id] = len(sample.token_ids)
            for where, first in (
                (present, start),
                (generated, max(start, sample.num_prompt_tokens)),
            ):
                tokens = sample.token_ids[first:]
                where[0].extend([row] * len(tokens))
                where[1].extend(tokens)
        device = self._counts.device
        yes = torch.tensor(True, device=device)
        one = torch.tensor(1, dtype=torch.int32, device=device)
        self._is_present.index_put_(
            torch.tensor(present, dtype=torch.int64, device=device).unbind(), yes
        )
        self._counts.index_put_(
            torch.tensor(generated, dtype=torch.int64, device=device).unbind(), one, accumulate=True
        )
        index = torch.tensor(rows, device=device)
        counts, is_present = self._counts[index], self._is_present[index]  # copies
        pairs = [(row, draft) for row, sample in enumerate(samples) for draft in sample.drafts]
        if pairs:
            drafts = torch.tensor(pairs, device=device).unbind(1)
            counts.index_put_(drafts, one, accumulate=True)
            is_present[drafts] = True
        return counts, is_present

    def release(self, request_id: str) -> None:
        """Give a request's row back."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            del self._num_counted[request_id]
            self._free_rows.append(row)

    def _row_of(self, request_id: str) -> int:
        row = self._rows.get(request_id)
        if row is not None:
            return row
        if not self._free_rows:
            num_rows = len(self._counts)
            self._free_rows = list(range(num_rows, max(4, 2 * num_rows)))
            more = (len(self._free_rows), self._counts.shape[1])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
            self._is_present = torch.cat([self._is_present, self._is_present.new_zeros(more)])
        row = self._free_rows.pop()
        self._counts[row] = 0
        self._is_present[row] = False
        self._rows[request_id] = row
        self._num_counted[request_id] = 0
        return row
