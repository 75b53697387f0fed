"""What the layers of some families do not hand on to their parts, given to these. Every rank.

Attention needs the step's blocks, and a decoder layer that keeps keyword arguments to itself leaves
it without. Tokens of several sequences lie side by side, and code that counts a token's position by
its place among them needs the true one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp_serving.model.attention import AttentionContext
from autotp_serving.model.token_choice import choose_tokens


class StepPositions:
    """Stands in for transformers' cache where it is asked how many tokens came before.

    The answer is a number for each token, which added to its place gives its position.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._offsets = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """[num_tokens]."""
        return self._offsets

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are: attention keeps them."""
        return key, value


class StepHooks:
    """Hooks before the forward passes of a model and of those of its parts that need something."""

    def __init__(self, model: nn.Module) -> None:
        self._context: AttentionContext | None = None
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        for module in model.modules():
            parameters = inspect.signature(module.forward).parameters
            if hasattr(module, "layer_idx") and _takes_more(parameters):
                module.register_forward_pre_hook(self._give_context, with_kwargs=True)
            if hasattr(module, "floor_scale") and "past_key_values" in parameters:
                module.register_forward_pre_hook(self._give_offsets, with_kwargs=True)
            if isinstance(module, nn.Embedding) and "position_ids" in parameters:
                module.register_forward_pre_hook(self._give_positions, with_kwargs=True)
        choose_tokens(model, lambda: self._context)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._context = kwargs.get("attention_context")

    def _give_context(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"attention_context": self._context, **kwargs}

    def _give_offsets(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "past_key_values": StepPositions(self._context.inputs.positions)}

    def _give_positions(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": self._context.inputs.positions}


def _takes_more(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
