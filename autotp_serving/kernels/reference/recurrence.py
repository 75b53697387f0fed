"""Short convolutions and recurrences over a flattened batch in portable torch. Every rank.

Each sequence goes on from the state in its row of a pool, one token after another: so a token's
numbers depend neither on its neighbours in the batch nor on how its prompt was cut into chunks.
The reference for faster kernels, and what runs where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autotp_serving.model.step_inputs import StepInputs


@dataclass(frozen=True)
class Spans:
    """Whose tokens a step runs; made once, for all layers. Tensors are on the device.

    Attributes:
        rows: [num_seqs] int64, each sequence's row of the pools.
        starts: [num_seqs] int64, where its tokens begin.
        lens: [num_seqs] int64, how many it runs.
        is_new: [num_seqs], it begins with this step, whatever its row held before.
        owners: [num_tokens] int64, each token's sequence.
        host_lens: [num_seqs], as `lens`, on the host.
    """

    rows: Tensor
    starts: Tensor
    lens: Tensor
    is_new: Tensor
    owners: Tensor
    host_lens: list[int]

    @staticmethod
    def of(inputs: StepInputs) -> Spans:
        """Of a step; without waiting for the device."""
        starts = inputs.query_starts.long()
        lens = starts[1:] - starts[:-1]
        num_added = inputs.num_seqs - len(inputs.host_query_lens)
        numbers = torch.arange(inputs.num_seqs, device=starts.device)
        return Spans(
            rows=inputs.rows.long(),
            starts=starts[:-1],
            lens=lens,
            is_new=lens == inputs.context_lens,
            owners=numbers.repeat_interleave(lens, output_size=inputs.num_tokens),
            host_lens=[*inputs.host_query_lens, *[1] * num_added],
        )


class Recurrence(Protocol):
    """How tokens are mixed with those before them in their sequence.

    All pools are [num_rows, ...]; the rows of the step's sequences are read, unless a sequence is
    new, and hold its state after its last token then. Other rows stay as they are.
    """

    def convolve(
        self, spans: Spans, inputs: Tensor, taps: Tensor, bias: Tensor | None, pool: Tensor
    ) -> Tensor:
        """Sum over each channel's latest inputs.

        Args:
            inputs: [num_tokens, num_channels].
            taps: [num_taps, num_channels] float32, the last for the token itself.
            bias: [num_channels] float32, or None.
            pool: [num_rows, num_taps - 1, num_channels] of the inputs' type: the latest inputs.

        Returns:
            [num_tokens, num_channels] float32.
        """
        ...

    def gated_delta(
        self,
        spans: Spans,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """The gated delta rule: S = S * decay; S += key x (value - key S) * beta; out = query S.

        All are float32.

        Args:
            query, key: [num_tokens, num_key_heads, key_dim]; a head of these serves
                num_heads / num_key_heads heads that follow one another.
            value: [num_tokens, num_heads, value_dim].
            decay: [num_tokens, num_heads], or [num_tokens, num_heads, key_dim].
            beta: [num_tokens, num_heads].
            pool: [num_rows, num_heads, key_dim, value_dim].

        Returns:
            [num_tokens, num_heads, value_dim].
        """
        ...

    def selective_scan(
        self,
        spans: Spans,
        inputs: Tensor,
        decay: Tensor,
        entry: Tensor,
        exit: Tensor,
        groups: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """Mamba-2's: S = S * decay + inputs x entry; out = S exit.

        All but `groups` are float32.

        Args:
            inputs: [num_tokens, num_heads, head_dim].
            decay: [num_tokens, num_heads].
            entry, exit: [num_tokens, num_groups, state_size].
            groups: [num_heads] int64, which of these a head uses.
            pool: [num_rows, num_heads, head_dim, state_size].

        Returns:
            [num_tokens, num_heads, head_dim].
        """
        ...

    def channel_scan(
        self,
        spans: Spans,
        inputs: Tensor,
        steps: Tensor,
        rates: Tensor,
        entry: Tensor,
        exit: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """Mamba's first: S = S * exp(steps rates) + (steps inputs) x entry; out = S exit.

        All are float32.

        Args:
            inputs, steps: [num_tokens, num_channels].
            rates: [num_channels, state_size], below 0.
            entry, exit: [num_tokens, state_size].
            pool: [num_rows, num_channels, state_size].

        Returns:
            [num_tokens, num_channels].
        """
        ...


class ReferenceRecurrence:
    """See Recurrence. A step of each sequence at a time, for all that have one left together."""

    def convolve(
        self, spans: Spans, inputs: Tensor, taps: Tensor, bias: Tensor | None, pool: Tensor
    ) -> Tensor:
        """See Recurrence."""
        num_past = len(taps) - 1
        num_tokens, num_channels = inputs.shape
        past = pool[spans.rows].masked_fill(spans.is_new[:, None, None], 0)
        # Each sequence's latest inputs, and then its own.
        joined = inputs.new_empty(num_tokens + len(past) * num_past, num_channels)
        begins = spans.starts + torch.arange(len(past), device=inputs.device) * num_past
        places = begins[:, None] + torch.arange(num_past, device=inputs.device)
        joined[places] = past
        own = torch.arange(num_tokens, device=inputs.device) + (spans.owners + 1) * num_past
        joined[own] = inputs
        out = torch.zeros((num_tokens, num_channels), dtype=torch.float32, device=inputs.device)
        for number, tap in enumerate(taps):
            out += joined[own - num_past + number].float() * tap
        if bias is not None:
            out += bias
        pool[spans.rows] = joined[places + spans.lens[:, None]]
        return out

    def gated_delta(
        self,
        spans: Spans,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """See Recurrence."""
        repeats = value.shape[1] // key.shape[1]
        query, key = (part.repeat_interleave(repeats, dim=1) for part in (query, key))
        out = torch.empty_like(value)
        decay = decay.view(*beta.shape, -1, 1)

        def advance(state: Tensor, tokens: Tensor) -> None:
            one_key = key[tokens][..., None]
            state *= decay[tokens]
            known = (state * one_key).sum(-2)
            change = (value[tokens] - known) * beta[tokens][..., None]
            state += one_key * change[..., None, :]
            out[tokens] = (state * query[tokens][..., None]).sum(-2)

        _run(spans, pool, advance)
        return out

    def selective_scan(
        self,
        spans: Spans,
        inputs: Tensor,
        decay: Tensor,
        entry: Tensor,
        exit: Tensor,
        groups: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """See Recurrence."""
        out = torch.empty_like(inputs)

        def advance(state: Tensor, tokens: Tensor) -> None:
            state *= decay[tokens][..., None, None]
            state += inputs[tokens][..., None] * entry[tokens][:, groups, None]
            out[tokens] = (state * exit[tokens][:, groups, None]).sum(-1)

        _run(spans, pool, advance)
        return out

    def channel_scan(
        self,
        spans: Spans,
        inputs: Tensor,
        steps: Tensor,
        rates: Tensor,
        entry: Tensor,
        exit: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """See Recurrence."""
        out = torch.empty_like(inputs)

        def advance(state: Tensor, tokens: Tensor) -> None:
            step = steps[tokens][..., None]
            state *= (step * rates).exp()
            state += step * inputs[tokens][..., None] * entry[tokens][:, None]
            out[tokens] = (state * exit[tokens][:, None]).sum(-1)

        _run(spans, pool, advance)
        return out


def _run(spans: Spans, pool: Tensor, advance: Callable[[Tensor, Tensor], None]) -> None:
    """Advance every sequence token by token.

    Args:
        advance: of states [count, ...], in place, by these tokens [count].
    """
    lens = spans.host_lens
    rows, starts, is_new = spans.rows, spans.starts, spans.is_new
    longest = max(lens)
    if longest > 1:  # the longest first, so that those with tokens left are the first
        order = torch.tensor(sorted(range(len(lens)), key=lambda index: -lens[index]))
        order = order.to(rows.device, non_blocking=True)
        rows, starts, is_new = rows[order], starts[order], is_new[order]
    state = pool[rows]
    state = state.masked_fill(is_new.view(-1, *[1] * (state.dim() - 1)), 0)
    for number in range(longest):
        count = sum(length > number for length in lens)
        advance(state[:count], starts[:count] + number)
    pool[rows] = state
