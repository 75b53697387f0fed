"""Attention over the paged KV cache, entered through transformers' AttentionInterface. Every rank.

The model runs with `input_ids` of shape [1, num_tokens] and no cache of its own; its attention
layers call `paged_attention`, which writes the new keys and values into the blocks and lets each
sequence attend to its own, both by the cache's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from autotp_serving.config import ConfigError
from autotp_serving.kernels.reference.attention import PortableAttention
from autotp_serving.kernels.reference.recurrence import Spans
from autotp_serving.model.chunks import split_by_chunks
from autotp_serving.model.kv_cache import Attention, KVCache
from autotp_serving.model.step_inputs import StepInputs

ATTENTION_NAME = "autotp_paged"

HARMLESS_TENSORS = ("cache_position", "position_ids", "logits_to_keep")
"""Arguments that tell attention nothing it does not know."""


@dataclass(frozen=True)
class AttentionContext:
    """What attention must know of one step; made once, used by every layer.

    Attributes:
        inputs: the step's.
        attention: attends for all tokens.
        by_chunks: the same within chunks, by their length; made when first asked for.
    """

    cache: KVCache
    inputs: StepInputs
    attention: Attention
    by_chunks: dict[int, Attention] = field(default_factory=dict)

    @staticmethod
    def of(inputs: StepInputs, cache: KVCache) -> AttentionContext:
        """What attention over this cache needs of a step's inputs."""
        attention = cache.kernels.attention(inputs, cache.block_size, cache.is_int8)
        return AttentionContext(cache, inputs, attention)

    @cached_property
    def spans(self) -> Spans:
        """The step's sequences, for layers that keep a state (`state_layers.py`)."""
        return Spans.of(self.inputs)

    @cached_property
    def context_slots(self) -> list[torch.Tensor]:
        """Of each sequence [context_len], for layers that choose tokens (`token_choice.py`)."""
        size = self.cache.block_size
        offsets = torch.arange(size, device=self.inputs.slots.device)
        tables = self.inputs.block_tables[self.inputs.rows.long()].long()
        return [
            (table[: -(-length // size), None] * size + offsets).flatten()[:length]
            for table, length in zip(tables, self.inputs.host_context_lens, strict=False)
        ]

    def choose_attention(self, module: nn.Module, chosen: torch.Tensor | None = None) -> Attention:
        """For a layer's attention: over whole contexts, or within chunks if its type says so.

        Args:
            chosen: positions that each token sees alone, as of `TokenChoice`.
        """
        if chosen is not None:
            assert isinstance(self.attention, PortableAttention), "see KVCacheShape.is_sparse"
            return self.attention.among(chosen)
        types = getattr(getattr(module, "config", None), "layer_types", None) or ()
        if "chunked_attention" not in types or types[module.layer_idx] != "chunked_attention":
            return self.attention
        chunk_len = module.config.attention_chunk_size
        if chunk_len not in self.by_chunks:
            inputs = split_by_chunks(self.inputs, chunk_len, self.cache.block_size)
            self.by_chunks[chunk_len] = self.cache.kernels.attention(
                inputs, self.cache.block_size, self.cache.is_int8
            )
        return self.by_chunks[chunk_len]


def register_paged_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers; masks are built here, not there."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the blocks of each sequence.

    Args:
        query: [1, num_heads, num_tokens, head_dim], rotated.
        key, value: [1, num_kv_heads, num_tokens, head_dim].
        sliding_window: how many of the latest positions are visible; None for all.
        softcap: logits become softcap * tanh(logits / softcap).
        s_aux: [num_heads], a logit of each head that has no value (an attention sink).
        indices: [num_tokens, most chosen], positions that a token sees alone; see `TokenChoice`.
        attention_context: passed through the model's forward by the runner.

    Returns:
        [1, num_tokens, num_heads, head_dim] and no attention weights.

    Raises:
        ConfigError: the architecture asks for what is not done here; in the first pass at start.
    """
    if attention_context is None:
        raise ConfigError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention: "
            "this architecture cannot be served"
        )
    _refuse_unknown(module, attention_mask, kwargs)
    context = attention_context
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    pools = context.cache.write(module.layer_idx, context.inputs.slots, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = context.choose_attention(module, indices).attend(
        query, (key, value), pools, scaling, sliding_window, softcap, s_aux
    )
    return output[None], None


def _refuse_unknown(module: nn.Module, mask: object, arguments: dict[str, Any]) -> None:
    """Refuse tensors that would change what attention computes, had we heeded them."""
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    is_told = mask is not None and not (isinstance(mask, torch.Tensor) and mask.numel() == 0)
    unknown = ["attention_mask"] if is_told else []
    unknown += [name for name in tensors if name not in HARMLESS_TENSORS]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} gives its attention {', '.join(unknown)}, which is not "
            "supported: this architecture cannot be served"
        )
