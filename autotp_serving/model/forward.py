"""One forward pass over a step's tokens, as transformers' own model code does it. Every rank."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from autotp_serving.batch import Batch
from autotp_serving.layers.head import PoolingHead
from autotp_serving.model.attention import AttentionContext
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.step_inputs import StepInputs


class Forward(Protocol):
    """A way through the model's layers.

    Attributes:
        can_draft: whether tokens that are guessed may run beside the ones they follow, which get
            the logits that they would get alone.
    """

    @property
    def can_draft(self) -> bool:
        """See above."""
        ...

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Run a step's tokens. Returns logits [num_logit_rows, vocab_size], in the model's type;
        only this rank's slice where its head does not gather them. Of a model that is pooled: what
        its PoolingHead gives, [num_logit_rows, hidden_size or labels].
        """
        ...

    def find_padded_size(self, batch: Batch) -> int:
        """How many sequences the batch's inputs are to be padded to; 0 for none."""
        ...


class PlainForward:
    """Runs any model whose attention goes through `paged_attention`."""

    can_draft = False

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    def find_padded_size(self, batch: Batch) -> int:
        """See Forward."""
        return 0

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """See Forward."""
        arguments = {
            "input_ids": inputs.token_ids[None],
            "position_ids": inputs.positions[None],
            "use_cache": False,
            "attention_context": AttentionContext.of(inputs, self._cache),
        }
        head = self._model.get_output_embeddings()
        if isinstance(head, PoolingHead):  # the whole model would scale and cap what it gives
            hidden = self._model.base_model(**arguments).last_hidden_state[0]
            return head(hidden[inputs.logit_rows])
        return self._model(logits_to_keep=inputs.logit_rows, **arguments).logits[0]
