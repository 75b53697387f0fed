"""The KV cache and attention over it in portable torch, on any device. Every rank.

The reference for faster kernels, and what runs where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autotp_serving.kernels.kv_pools import Pools

if TYPE_CHECKING:
    from autotp_serving.model.kv_cache import KVCacheShape
    from autotp_serving.model.step_inputs import StepInputs


class ReferenceCache:
    """See CacheKernels. Pools are [num_slots, num_kv_heads, head_dim].

    Args:
        zeros: allocates as torch.zeros does.
        is_causal: tokens see those before them only, else all of their step; then a sequence is in
            one step as a whole.
    """

    def __init__(
        self, zeros: Callable[..., Tensor] = torch.zeros, *, is_causal: bool = True
    ) -> None:
        self._zeros = zeros
        self._is_causal = is_causal

    def allocate_kv(self, shape: KVCacheShape, num_slots: int, device: torch.device) -> list[Pools]:
        """See CacheKernels."""
        layers = []
        for heads, key, value in shape.head_shapes:
            wanted = [((num_slots, heads, size), shape.stored_dtype) for size in (key, value)]
            if shape.is_int8:
                wanted += [((num_slots, heads), torch.float32)] * 2
            with device:
                layers.append(Pools(*(self._zeros(size, dtype=dtype) for size, dtype in wanted)))
        return layers

    def store(self, slots: Tensor, key: Tensor, value: Tensor, pools: Pools) -> None:
        """See CacheKernels."""
        pools.write(slots, key, value)

    def attention(self, inputs: StepInputs, block_size: int, is_int8: bool) -> PortableAttention:
        """See CacheKernels."""
        return PortableAttention.of(inputs, block_size, is_int8, is_causal=self._is_causal)


@dataclass(frozen=True)
class Prefill:
    """One sequence that runs several tokens: rows [start, stop) of the flattened batch.

    Attributes:
        context_slots: [context_len] cache slots of its context, or None when the context is just
            these rows, which are then used as they are, unless the cache rounds them: then a
            prompt at once must see what it would see in pieces.
        chosen: [num_rows, most chosen] positions that each row sees alone, -1 for none; None: all
            that are before it.
    """

    start: int
    stop: int
    context_len: int
    context_slots: torch.Tensor | None
    chosen: torch.Tensor | None = None


@dataclass(frozen=True)
class Decodes:
    """All sequences that run a single token, attended in one padded batch.

    Attributes:
        rows: [num_seqs] their rows in the flattened batch.
        context_slots: [num_seqs, longest_context] cache slots, padded with the sequence's first.
        context_lens: [num_seqs].
    """

    rows: torch.Tensor
    context_slots: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True)
class PortableAttention:
    """What is to be attended in one step: prompts one by one, single tokens together."""

    prefills: tuple[Prefill, ...]
    decodes: Decodes | None
    is_causal: bool = True

    @staticmethod
    def of(
        inputs: StepInputs, block_size: int, is_int8: bool, *, is_causal: bool = True
    ) -> PortableAttention:
        """Find the cache slots of all contexts, on the inputs' device."""
        device = inputs.slots.device
        offsets = torch.arange(block_size, device=device)

        def find_slots(tables: torch.Tensor) -> torch.Tensor:
            """[..., num_blocks] to [..., num_blocks * block_size]."""
            return (tables.long()[..., None] * block_size + offsets).flatten(-2)

        prefills, decode_rows, decode_seqs = [], [], []
        longest = start = 0
        for index, (query_len, context_len) in enumerate(
            zip(inputs.host_query_lens, inputs.host_context_lens, strict=True)
        ):
            stop = start + query_len
            if query_len == 1:
                decode_rows.append(start)
                decode_seqs.append(index)
                longest = max(longest, context_len)
            else:
                slots = None
                if context_len > query_len or is_int8:
                    num_blocks = -(-context_len // block_size)
                    table = inputs.block_tables[inputs.rows[index : index + 1], :num_blocks]
                    slots = find_slots(table)[0, :context_len]
                prefills.append(Prefill(start, stop, context_len, slots))
            start = stop
        decodes = None
        if decode_rows:
            chosen = torch.tensor(decode_seqs, device=device)
            num_blocks = -(-longest // block_size)
            tables = inputs.block_tables[inputs.rows[chosen], :num_blocks]
            slots = find_slots(tables)[:, :longest]
            context_lens = inputs.context_lens[chosen].long()
            # A NaN survives the mask, so what is masked must be this sequence's own: NaN of one
            # request, or left behind by one, then spoils no other.
            is_own = torch.arange(slots.shape[1], device=device) < context_lens[:, None]
            slots = torch.where(is_own, slots, slots[:, :1])
            decodes = Decodes(torch.tensor(decode_rows, device=device), slots, context_lens)
        return PortableAttention(tuple(prefills), decodes, is_causal)

    def among(self, chosen: torch.Tensor) -> PortableAttention:
        """The same, where each token sees chosen ones alone.

        Args:
            chosen: [num_tokens, most chosen] positions in each token's sequence; -1 behind them.
        """
        most = chosen.shape[1]
        prefills = tuple(
            replace(one, chosen=chosen[one.start : one.stop]) if one.context_len > most else one
            for one in self.prefills
        )
        decodes = self.decodes
        if decodes is not None:
            rows = chosen[decodes.rows]
            slots = decodes.context_slots.gather(1, rows.clamp(min=0))
            slots = torch.where(rows >= 0, slots, decodes.context_slots[:, :1])
            decodes = Decodes(decodes.rows, slots, (rows >= 0).sum(1))
        return PortableAttention(prefills, decodes, self.is_causal)

    def attend(
        self,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        pools: Pools,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend in one layer.

        Args:
            query: [num_tokens, num_heads, head_dim].
            new: the tokens' own keys and values, [num_tokens, num_kv_heads, head_dim].
            pools: the layer's, with the new.
            sinks: [num_heads], a logit of each head that has no value.

        Returns:
            [num_tokens, num_heads, value_head_dim].
        """
        output = query.new_empty((query.shape[0], query.shape[1], new[1].shape[-1]))
        for prefill in self.prefills:
            rows = slice(prefill.start, prefill.stop)
            slots = prefill.context_slots
            if slots is None:
                key, value = (numbers[rows] for numbers in new)
            else:
                key, value = pools.read(slots, query.dtype)
            output[rows] = _attend_prefill(
                query[rows],
                key,
                value,
                scaling,
                sliding_window,
                softcap,
                sinks,
                self.is_causal,
                prefill.chosen,
            )
        if self.decodes is not None:
            output[self.decodes.rows] = _attend_decodes(
                query, pools, self.decodes, scaling, sliding_window, softcap, sinks
            )
        return output


def _attend_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    is_causal: bool,
    chosen: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last query_len positions of a context, by default causal.

    Args:
        query: [query_len, num_heads, head_dim].
        key, value: [context_len, num_kv_heads, head_dim].

    Returns:
        [query_len, num_heads, head_dim].
    """
    query_len, context_len = query.shape[0], key.shape[0]
    num_groups = query.shape[1] // key.shape[1]
    query = query.transpose(0, 1)[None]
    key = key.transpose(0, 1).repeat_interleave(num_groups, dim=0)[None]
    value = value.transpose(0, 1).repeat_interleave(num_groups, dim=0)[None]
    is_plain = sliding_window is softcap is sinks is chosen is None
    if query_len == context_len and is_plain:
        output = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling)
        return output[0].transpose(0, 1)
    key_position = torch.arange(context_len, device=query.device)
    query_position = key_position[context_len - query_len :, None]
    visible = (key_position <= query_position) | (not is_causal)
    if sliding_window is not None:
        visible &= key_position > query_position - sliding_window
    if chosen is not None:
        visible &= mark_chosen(chosen, context_len)
    sinks = None if sinks is None else sinks[:, None, None]
    return _attend_masked(query, key, value, visible, scaling, softcap, sinks)[0].transpose(0, 1)


def mark_chosen(chosen: torch.Tensor, context_len: int) -> torch.Tensor:
    """Positions [num_rows, most chosen], -1 for none, as a boolean mask [num_rows, context_len]."""
    places = chosen.where(chosen >= 0, context_len)
    mask = torch.zeros((len(chosen), context_len + 1), dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, places, True)[:, :context_len]


def _attend_decodes(
    query: torch.Tensor,
    pools: Pools,
    decodes: Decodes,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query per sequence; the heads that share a key/value head stand in as query rows.

    Returns:
        [num_decodes, num_heads, head_dim].
    """
    rows = query[decodes.rows]
    num_seqs, num_heads, _ = rows.shape
    key, value = (
        numbers.transpose(1, 2) for numbers in pools.read(decodes.context_slots, query.dtype)
    )
    num_kv_heads = key.shape[1]
    rows = rows.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, -1)
    position = torch.arange(key.shape[2], device=query.device)
    visible = position < decodes.context_lens[:, None]
    if sliding_window is not None:
        visible &= position >= decodes.context_lens[:, None] - sliding_window
    sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
    output = _attend_masked(rows, key, value, visible[:, None, None], scaling, softcap, sinks)
    return output.reshape(num_seqs, num_heads, -1)


def _attend_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention under a boolean mask; by hand with a softcap or sinks, because torch has none."""
    if softcap is sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    logits = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.float().expand(*logits.shape[:-1], 1)), dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value
