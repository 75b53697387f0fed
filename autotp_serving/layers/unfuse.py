"""Layers that AutoTP would shard wrongly or not at all, taken apart into ones it shards rightly.

Every rank. Phi-3 computes queries, keys and values (and gate and up) by one matrix, a slice of
whose rows is no rank's share of heads; transformers 5 keeps all experts of a layer in one 3-D
parameter, which AutoTP leaves whole. Both become plain linear layers under the names of Llama's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn

from autotp_serving.config import ConfigError

AllReduce = Callable[[torch.Tensor], torch.Tensor]


class FusedOutput(nn.Module):
    """Stands where the fused layer was: the outputs of its parts, side by side.

    The parts are children of the same parent, so that AutoTP finds and replaces them there.

    Attributes:
        sizes: names of the parts, in order, and their rows on all ranks together.
    """

    def __init__(self, parent: nn.Module, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        # In a tuple, or the parent would become a child of its child.
        self._parent = (parent,)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden_size] to [..., this rank's rows of all parts]."""
        (parent,) = self._parent
        return torch.cat([getattr(parent, name)(hidden) for name in self.sizes], dim=-1)


class Expert(nn.Module):
    """One expert: a gated MLP, or one without a gate.

    Args:
        activate: maps [num_tokens, 2 * intermediate_size], gate and up, to half of it; without a
            gate, [num_tokens, intermediate_size] to the same.
        is_interleaved: it takes a column of gate and one of up in turn, not all gate before all up.
        has_bias: gate and up have biases; the down projection's is `Experts`' own.
        has_gate: False for an expert that has none.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activate: Callable[[torch.Tensor], torch.Tensor],
        *,
        is_interleaved: bool = False,
        has_bias: bool = False,
        has_gate: bool = True,
    ) -> None:
        super().__init__()
        self.gate_proj = None
        if has_gate:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=has_bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=has_bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self._activate = activate
        self._is_interleaved = is_interleaved

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [num_tokens, hidden_size] to the same shape: this rank's part of the sum."""
        if self.gate_proj is None:
            return self.down_proj(self._activate(self.up_proj(hidden)))
        parts = (self.gate_proj(hidden), self.up_proj(hidden))
        if self._is_interleaved:
            gate_up = torch.stack(parts, dim=-1).flatten(-2)
        else:
            gate_up = torch.cat(parts, dim=-1)
        return self.down_proj(self._activate(gate_up))


class AbsentExpert(nn.Module):
    """Stands for an expert that another rank has.

    Attributes:
        tensors: names of what it would hold.
    """

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.tensors = tuple(expert.state_dict(keep_vars=True))


class Experts(nn.ModuleList):
    """All experts of a layer; one all-reduce over the ranks for all of them together.

    Attributes:
        down_proj_bias: [num_experts, hidden_size], whole on every rank, or None.
        adds_bias: on one rank only, for the sum over the ranks is to hold it once.
        is_transposed: where a checkpoint stacks them, it has [input, output] of each.
        is_interleaved: a checkpoint's stack has a row of gate and one of up in turn.
        scales_input: the router's weight multiplies what an expert is given, not what it gives.
        original: transformers' module, emptied, whose code they are checked with. In a tuple, or it
            would become one of the experts.
        are_whole: each is on one rank, and not a part of it on every rank.
    """

    reduce: AllReduce | None = None
    down_proj_bias: nn.Parameter | None
    adds_bias = True
    is_transposed = False
    is_interleaved = False
    scales_input = False
    original: tuple[nn.Module] | None = None
    are_whole = False

    def __init__(
        self, experts: Iterable[Expert], down_proj_bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(experts)
        self.register_parameter("down_proj_bias", down_proj_bias)

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Send each token through the experts that the router chose.

        Args:
            hidden: [num_tokens, hidden_size].
            top_k_index, top_k_weights: [num_tokens, experts of one token]; an index past the last
                expert stands for none.
        """
        out = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            if number >= len(self) or isinstance(self[number], AbsentExpert):
                continue
            token, position = torch.where(top_k_index == number)
            weight = top_k_weights[token, position, None]
            part = self[number](hidden[token] * weight if self.scales_input else hidden[token])
            if self.down_proj_bias is not None and self.adds_bias:
                part = part + self.down_proj_bias[number]
            if not self.scales_input:
                part = part * weight
            out.index_add_(0, token, part.to(out.dtype))
        return out if self.reduce is None else self.reduce(out)


class Llama4Mixture(nn.Module):
    """Llama 4's mixture of experts, which sends each token through the chosen experts only.

    Transformers' sends every token through every expert, most of them multiplied by zero.
    """

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.router, self.shared_expert = mixture.router, mixture.shared_expert
        stacked = mixture.experts
        with torch.device("meta"):
            self.experts = Experts(
                Expert(
                    stacked.hidden_size,
                    stacked.expert_dim,
                    lambda gate_up: _multiply_by_gate(gate_up, stacked.act_fn),
                )
                for _ in range(stacked.num_experts)
            ).to(stacked.down_proj.dtype)
        self.experts.is_transposed = self.experts.scales_input = True

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map [..., hidden_size] to [num_tokens, hidden_size] and the router's logits."""
        hidden = hidden.flatten(0, -2)
        scores, logits = self.router(hidden)
        weights, chosen = scores.topk(self.router.top_k, dim=-1)
        out = self.experts(hidden, chosen, weights)
        return out + self.shared_expert(hidden), logits


def _multiply_by_gate(
    gate_up: torch.Tensor, activate: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * activate(gate)


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether transformers' code for a layer's experts is what `Experts` computes.

    Their classes say of themselves how they are laid out, and share one forward pass.
    """
    if not hasattr(module, "has_gate") or not hasattr(module, "is_concatenated"):
        return False
    expected = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    if not module.has_gate and (module.has_bias or not hasattr(module, "act_fn")):
        return False
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    return (
        not getattr(module, "has_post_expert_norm", False)  # younger than the rest
        and {name for name, _ in module.named_parameters()} == expected
    )


def split_layers(model: nn.Module) -> None:
    """Take apart what AutoTP cannot shard; before it runs, on the meta device."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind == "Phi3Attention":
            heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
            sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
            split_linear(
                module, "qkv_proj", {part: n * module.head_dim for part, n in sizes.items()}
            )
        elif (fused_name := find_gate_up(module)) is not None:
            size = getattr(module, fused_name).out_features // 2
            split_linear(module, fused_name, {"gate_proj": size, "up_proj": size})
        elif kind == "Llama4TextMoe":
            model.set_submodule(name, Llama4Mixture(module))
        elif is_stack_of_experts(module):
            model.set_submodule(name, _split_experts(module))


def deal_out_experts(model: nn.Module, rank: int, num_ranks: int) -> None:
    """Leave this rank every so many of the experts of each layer, whole; before AutoTP.

    Raises:
        ConfigError: there are none to deal out, or too few.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    if not layers:
        raise ConfigError(
            f"--expert-parallel: the family '{model.config.model_type}' has no experts that could "
            "be dealt out: leave the flag out"
        )
    fewest = min(map(len, layers))
    if fewest < num_ranks:
        raise ConfigError(
            f"--expert-parallel: {num_ranks} ranks cannot share {fewest} experts: start at most "
            f"{fewest} ranks, or leave the flag out"
        )
    for experts in layers:
        experts.are_whole = True
        for number in range(len(experts)):
            if number % num_ranks != rank:
                experts[number] = AbsentExpert(experts[number])


def list_absent_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors that other ranks' experts hold."""
    return {
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, AbsentExpert)
        for tensor in module.tensors
    }


def find_gate_up(module: nn.Module) -> str | None:
    """Name of the matrix that computes gate and up, one after the other, in an MLP like Phi-3's."""
    for fused_name, last_name in (("gate_up_proj", "down_proj"), ("input_linear", "output_linear")):
        gate_up, down = getattr(module, fused_name, None), getattr(module, last_name, None)
        if (
            isinstance(gate_up, nn.Linear)
            and isinstance(down, nn.Linear)
            and gate_up.out_features == 2 * down.in_features
            and ".chunk(2, dim=-1)" in inspect.getsource(type(module).forward)
        ):
            return fused_name
    return None


def split_linear(parent: nn.Module, fused_name: str, sizes: dict[str, int]) -> None:
    """Put linear layers of so many rows each beside a fused one, and their join in its place."""
    fused = getattr(parent, fused_name)
    for name, size in sizes.items():
        part = nn.Linear(
            fused.in_features, size, fused.bias is not None, "meta", fused.weight.dtype
        )
        parent.add_module(name, part)
    setattr(parent, fused_name, FusedOutput(parent, sizes))


def _split_experts(stacked: nn.Module) -> Experts:
    num_experts, *sizes = stacked.down_proj.shape
    is_transposed = bool(stacked.is_transposed)
    intermediate_size, hidden_size = sizes if is_transposed else reversed(sizes)
    is_interleaved = not stacked.is_concatenated
    dtype = stacked.down_proj.dtype
    # What is left of it is its way to join gate and up, with whatever that needs.
    for name, _ in list(stacked.named_parameters()):
        delattr(stacked, name)
    with torch.device("meta"):
        down_proj_bias = None
        if stacked.has_bias:
            down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        experts = Experts(
            (
                Expert(
                    hidden_size,
                    intermediate_size,
                    stacked._apply_gate if stacked.has_gate else stacked.act_fn,
                    is_interleaved=is_interleaved,
                    has_bias=stacked.has_bias,
                    has_gate=stacked.has_gate,
                )
                for _ in range(num_experts)
            ),
            down_proj_bias,
        )
    experts.is_transposed = is_transposed
    experts.is_interleaved = is_interleaved
    experts.original = (stacked,)
    return experts.to(dtype)


def finish_split(model: nn.Module, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
    """Tell the parts what their share is; after AutoTP."""
    for module in model.modules():
        if type(module).__name__ == "Phi3Attention":
            # It finds its queries by the config's count of heads, which is that of all ranks.
            module.config = copy.copy(module.config)
            module.config.num_attention_heads = _num_heads(module.q_proj, module.head_dim)
            module.num_key_value_heads = _num_heads(module.k_proj, module.head_dim)
        elif isinstance(module, Experts) and num_ranks > 1:
            module.reduce = all_reduce
            if not module.are_whole:
                for expert in module:
                    expert.down_proj.mp_group = None
                module.adds_bias = rank == 0


def _num_heads(linear: nn.Module, head_dim: int) -> int:
    return linear.weight.shape[0] // head_dim
