"""Sparse attention whose tokens an indexer chooses (DeepSeek V3.2, GLM 5). Every rank.

An indexer, whole on each rank, scores all earlier tokens of a sequence for each of its queries, and
attention then sees the best of them alone. Transformers' own code scores; here it is given one
sequence at a time, whose earlier keys it finds in our blocks. There they are kept as a layer more
with one head, half of a key as the head's key and half as its value, so that whatever holds for
blocks holds for them too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.config import ConfigError
from autotp_serving.kernels.reference.attention import mark_chosen
from autotp_serving.model.attention import AttentionContext

MAX_SCORE_BYTES = 2**26
"""Of the scores that are in memory at once: a prompt's queries come in parts."""

INDEXER_ARGUMENTS = (
    *("hidden_states", "q_resid", "position_embeddings", "attention_mask", "position_ids"),
    "past_key_values",
)
"""Of the indexers that are known here, in their order."""


def find_indexers(model: nn.Module) -> list[nn.Module]:
    """Those of a model, in its order."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "index_topk")
        and tuple(inspect.signature(type(module).forward).parameters)[1:] == INDEXER_ARGUMENTS
    ]


def choose_tokens(model: nn.Module, find_context: Callable[[], AttentionContext]) -> None:
    """Have the indexers of a model choose among the tokens in our blocks.

    Args:
        find_context: the step's, when asked in its forward pass.
    """
    indexers = find_indexers(model)
    first = model.config.get_text_config().num_hidden_layers
    for number, indexer in enumerate(indexers):
        indexer.forward = TokenChoice(indexer, first + number, find_context)
    for module in model.modules():
        if getattr(module, "indexer", None) in indexers:
            module.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _give_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a layer hands its indexer a part of; it says nothing, as attention needs no mask."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = kwargs["hidden_states"].new_empty((1, 1, 0, 0))
    return args, {**kwargs, "attention_mask": mask}


class TokenChoice:
    """Stands in for an indexer's forward.

    Args:
        indexer: transformers', with its own forward.
        layer: under which its keys are kept.
    """

    def __init__(
        self, indexer: nn.Module, layer: int, find_context: Callable[[], AttentionContext]
    ) -> None:
        self._indexer = indexer
        self._score = indexer.forward
        self._layer = layer
        self._find_context = find_context

    def __call__(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Choose for each token of the step.

        Args:
            hidden_states: [1, num_tokens, hidden_size]; the others alike.
            attention_mask: transformers' own in the check at start, [1, num_tokens, num_tokens],
                for what it chooses is compared; else empty.

        Returns:
            [num_tokens, most chosen] int64, positions in each token's sequence, rising; -1 behind.

        Raises:
            ConfigError: in the check, if transformers chooses other tokens.
        """
        context = self._find_context()
        most = min(self._indexer.index_topk, context.inputs.max_context_len)
        chosen = hidden_states.new_full((hidden_states.shape[1], most), -1, dtype=torch.int64)
        cos, sin = position_embeddings
        start = 0
        for slots, query_len in zip(
            context.context_slots, context.inputs.host_query_lens, strict=True
        ):
            keys = _IndexerKeys(context, self._layer, slots[: len(slots) - query_len])
            places = torch.arange(len(slots), device=chosen.device)
            part = max(1, MAX_SCORE_BYTES // (4 * self._indexer.n_heads * len(slots)))
            for begin in range(start, start + query_len, part):
                rows = slice(begin, min(begin + part, start + query_len))
                new = slots[len(keys.slots) :][: rows.stop - rows.start]
                keys.slots = torch.cat((keys.slots, new))
                last = len(keys.slots)
                best = self._score(
                    hidden_states[:, rows],
                    q_resid[:, rows],
                    (cos[:, rows], sin[:, rows]),
                    (places[:last] <= places[last - len(new) : last, None])[None],
                    None,
                    past_key_values=keys,
                )[0].long()
                chosen[rows, : best.shape[1]] = best.sort(dim=1).values
            start += query_len
        if attention_mask.numel():
            self._compare(
                chosen, hidden_states, q_resid, position_embeddings, attention_mask, position_ids
            )
        return chosen

    def _compare(self, chosen: Tensor, *arguments: Any) -> None:
        theirs, length = self._score(*arguments)[0].long(), len(chosen)
        # Of fewer tokens than are to be chosen, later ones come along, which nobody sees.
        ours, theirs = (mark_chosen(one, length).tril() for one in (chosen, theirs))
        if not torch.equal(theirs, ours):
            raise ConfigError(
                f"{type(self._indexer).__name__} chooses other tokens here than in transformers: "
                "this architecture cannot be served"
            )


class _IndexerKeys:
    """Stands in for transformers' cache of one indexer and one sequence, in one step.

    Args:
        slots: of the tokens before the step's; later up to the last that is asked for.
    """

    def __init__(self, context: AttentionContext, layer: int, slots: Tensor) -> None:
        self._context, self._layer, self.slots = context, layer, slots
        self._num_before = len(slots)
        self._keys: Tensor | None = None  # those that were read or came

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Store [1, num_new, index_head_dim] and return all, [1, context_len, index_head_dim]."""
        halves = keys[0, :, None].chunk(2, dim=-1)
        cache = self._context.cache
        pools = cache.write(self._layer, self.slots[-keys.shape[1] :], *halves)
        if cache.is_int8:  # a prompt at once must see what it would see in pieces
            return torch.cat(pools.read(self.slots, keys.dtype), dim=-1)[None, :, 0]
        if self._keys is None and self._num_before:
            earlier = pools.read(self.slots[: self._num_before], keys.dtype)
            self._keys = torch.cat(earlier, dim=-1)[None, :, 0]
        self._keys = keys if self._keys is None else torch.cat((self._keys, keys), dim=1)
        return self._keys
