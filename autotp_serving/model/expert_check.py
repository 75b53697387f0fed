"""Proof, at start, that experts taken out of their stack compute what transformers' code does.

Every rank, for its own part. Transformers' class is given, matrix by matrix, what our linear layers
multiply by, so the check needs no second copy of the experts, and holds for shards and low-bit
weights alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autotp_serving.config import ConfigError
from autotp_serving.layers.unfuse import Expert, Experts

NUM_TOKENS = 8
TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.06, torch.float16: 0.06}
"""Relative to the output's norm; low-bit products round what they multiply, in float32 too."""


class _Stack:
    """Stands for a parameter with a matrix of each expert: that of a number, when asked for it."""

    def __init__(self, read: Callable[[int], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, number: Any) -> torch.Tensor:
        return self._read(int(number))


def check_experts(model: nn.Module, device: torch.device) -> None:
    """Refuse a model one of whose kinds of experts comes out otherwise than in transformers.

    Raises:
        ConfigError: naming the family.
    """
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, Experts) or module.original is None:
            continue
        (original,) = module.original
        if type(original) in seen:
            continue
        seen.add(type(original))
        error = _compare(module, original, model.dtype, device)
        if not error < TOLERANCES[model.dtype]:
            raise ConfigError(
                f"the family '{model.config.model_type}' cannot be served: {name} is off by "
                f"{error:.0%} from transformers' own {type(original).__name__}"
            )


def _compare(
    experts: Experts, original: nn.Module, dtype: torch.dtype, device: torch.device
) -> float:
    """How far our output is from transformers', for some tokens and two or fewer experts each."""
    generator = torch.Generator().manual_seed(0)
    here = [number for number, one in enumerate(experts) if isinstance(one, Expert)]
    first: Any = experts[here[0]]
    width = first.up_proj.weight.shape[1]
    hidden = torch.randn((NUM_TOKENS, width), generator=generator).to(device, dtype)
    chosen = torch.tensor([[here[0], here[-1]], [here[-1], here[0]]], device=device)
    chosen = chosen[:, : len(here)].repeat(NUM_TOKENS // 2, 1)
    weights = torch.rand(chosen.shape, generator=generator).to(device, dtype)
    reduce, experts.reduce = experts.reduce, None
    parts = _stacks(experts, dtype, device)
    try:
        for name, stack in parts.items():
            setattr(original, name, stack)
        with torch.inference_mode():
            ours = experts(hidden, chosen, weights).float()
            theirs = type(original).forward.__wrapped__(original, hidden, chosen, weights).float()
    finally:
        experts.reduce = reduce
        for name in parts:
            delattr(original, name)
    return ((ours - theirs).norm() / theirs.norm()).item()


def _stacks(experts: Experts, dtype: torch.dtype, device: torch.device) -> dict[str, _Stack]:
    """Transformers' parameters, by name, of what our linear layers compute."""

    def read_weight(linear: nn.Module) -> torch.Tensor:
        columns = linear.weight.shape[1]
        rows = linear(torch.eye(columns, dtype=dtype, device=device))
        return (rows - read_bias(linear)).T

    def read_bias(linear: nn.Module) -> torch.Tensor:
        return linear(torch.zeros((1, linear.weight.shape[1]), dtype=dtype, device=device))[0]

    def join(number: int, read: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        one: Any = experts[number]
        up = read(one.up_proj)
        if one.gate_proj is None:
            return up
        gate = read(one.gate_proj)
        if experts.is_interleaved:
            return torch.stack((gate, up), dim=1).flatten(0, 1)
        return torch.cat((gate, up))

    def turn(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T if experts.is_transposed else matrix

    def down(number: int) -> torch.Tensor:
        one: Any = experts[number]
        return turn(read_weight(one.down_proj))

    has_gate = any(isinstance(one, Expert) and one.gate_proj is not None for one in experts)
    first_name = "gate_up_proj" if has_gate else "up_proj"
    stacks = {
        first_name: _Stack(lambda number: turn(join(number, read_weight))),
        "down_proj": _Stack(down),
    }
    biases = experts.down_proj_bias
    if biases is not None:
        stacks[f"{first_name}_bias"] = _Stack(lambda number: join(number, read_bias))
        stacks["down_proj_bias"] = _Stack(lambda number: biases[number] * experts.adds_bias)
    return stacks
