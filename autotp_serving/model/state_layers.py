"""Layers that keep a state of fixed size for each sequence, beside the KV blocks. Every rank.

Gated delta nets (Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear, Ling 3), Mamba-2 (Granite 4,
Falcon-H1, Nemotron-H, Bamba), Mamba (Jamba), lightning attention (MiniMax) and short convolutions
(LFM2). They take the place of transformers'
layers, whose matrices they keep, and run what mixes tokens over the flattened batch, from and to
pools with a row for each running sequence. A sequence that begins finds zeros, whatever its row
held, unless rank 0 has the state of an equal beginning copied there first. Heads are shared out
evenly over ranks. Longer than other files, for all kinds share what is around their mixing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp_serving.config import ConfigError
from autotp_serving.kernels.reference.recurrence import Recurrence
from autotp_serving.layers.unfuse import AllReduce, FusedOutput, split_linear
from autotp_serving.model.attention import AttentionContext

L2_EPSILON = 1e-6


class ConvolutionPart(nn.Module):
    """The weights of some channels of a convolution over each channel alone.

    Attributes:
        weight: [num_channels, 1, num_taps].
        bias: [num_channels], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
        )


class StateLayer(nn.Module):
    """What these layers share. Subclasses name the parts of their matrices and say how they mix.

    Args:
        source: transformers' layer, on the meta device, which is taken apart.

    Attributes:
        sharding: of each linear layer in it: by "column" or "row", or "whole".
        convolution_parts: names of the children that hold the convolution's weights.
        whole_parts: those that every rank has whole.
        pools: the states, once `allocate` was called: the convolution's, and the recurrent one.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.layer_idx = source.layer_idx
        for name, child in source.named_children():
            self.add_module(name, child)
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.sharding: dict[str, str] = {}
        self.pools: tuple[Tensor, ...] = ()
        self.convolution_parts: tuple[str, ...] = ()
        self.whole_parts: tuple[str, ...] = ()
        self._taps: Tensor | None = None
        self._bias: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, attention_context: AttentionContext | None = None, **_: Any
    ) -> Tensor:
        """Map [1, num_tokens, hidden_size] to the same shape.

        Raises:
            ConfigError: the model does not pass on what the step is; in the first pass at start.
        """
        if attention_context is None:
            raise ConfigError(
                f"{type(self).__name__} is not given what its step is: this architecture cannot "
                "be served"
            )
        return self.mix(hidden_states[0], attention_context)[None]

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """The same for [num_tokens, hidden_size]."""
        raise NotImplementedError

    def plan_shares(self, num_ranks: int) -> None:
        """Say in `sharding` how each linear child is shared out; before any of them is.

        Raises:
            ConfigError: the heads cannot be shared out evenly.
        """
        raise NotImplementedError

    def take_share(self, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
        """Keep this rank's heads; the linear children are sharded already."""
        for part in self.convolution_parts:
            if part not in self.whole_parts:
                _shrink(getattr(self, part), num_ranks)

    def list_state_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of one row of each pool, on this rank."""
        parts = [getattr(self, name).weight for name in self.convolution_parts]
        num_channels = sum(len(part) for part in parts)
        return [((parts[0].shape[-1] - 1, num_channels), parts[0].dtype)]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a sequence's state in this layer, on this rank."""
        shapes = self.list_state_shapes()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)

    def allocate(self, num_rows: int, device: torch.device, recurrence: Recurrence) -> None:
        """Make pools of so many rows; once the weights are loaded."""
        self.recurrence = recurrence
        self.pools = tuple(
            torch.zeros((num_rows, *shape), dtype=dtype, device=device)
            for shape, dtype in self.list_state_shapes()
        )
        parts = [getattr(self, name) for name in self.convolution_parts]
        self._taps = torch.cat([part.weight[:, 0].float() for part in parts]).t().contiguous()
        if parts[0].bias is not None:
            self._bias = torch.cat([part.bias.float() for part in parts])

    def _split_convolution(self, name: str, sizes: dict[str, int]) -> None:
        """Take it apart by channels, of each part so many."""
        convolution = getattr(self, name)
        for part, weight in zip(sizes, convolution.weight.split(list(sizes.values())), strict=True):
            bias = None if convolution.bias is None else convolution.bias.new_empty(len(weight))
            self.add_module(part, ConvolutionPart(weight, bias))
        self.convolution_parts = tuple(sizes)
        setattr(self, name, FusedOutput(self, sizes))

    def _check_divides(self, count: int, what: str, parts: int, of: str = "ranks") -> None:
        if count % parts:
            raise ConfigError(
                f"{count} {what} cannot be shared out evenly over {parts} {of}, as the layers of "
                "this model that keep a state need: start another number of ranks"
            )

    def _convolve(self, inputs: Tensor, context: AttentionContext) -> Tensor:
        """Map [num_tokens, num_channels] to the same, in float32."""
        return self.recurrence.convolve(
            context.spans, inputs, self._taps, self._bias, self.pools[0]
        )


class ShortConvolution(StateLayer):
    """LFM2's: a gate, a convolution, another gate."""

    def __init__(self, source: nn.Module, config: Any) -> None:
        super().__init__(source)
        self._num_channels = source.conv.out_channels
        parts = ("in_proj_b", "in_proj_c", "in_proj_x")
        split_linear(self, "in_proj", dict.fromkeys(parts, self._num_channels))
        self._split_convolution("conv", {"conv_all": self._num_channels})
        self.sharding = {**dict.fromkeys(parts, "column"), "out_proj": "row"}

    def plan_shares(self, num_ranks: int) -> None:
        """See StateLayer."""
        self._check_divides(self._num_channels, "channels", num_ranks)

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """See StateLayer."""
        mixed = self._convolve(self.in_proj_b(hidden) * self.in_proj_x(hidden), context)
        return self.out_proj(self.in_proj_c(hidden) * mixed.to(hidden.dtype))


class GatedDeltaNet(StateLayer):
    """Qwen3-Next's and Qwen3.5's: linear attention whose state forgets, and corrects itself.

    Attributes:
        NORM, OUTPUT: what the family calls its last two children.
        CONVOLUTIONS: its convolutions, of queries, keys and values; by our names where its
            checkpoints have them in one.
    """

    NORM, OUTPUT = "norm", "out_proj"
    CONVOLUTIONS = ("conv_q", "conv_k", "conv_v")

    def __init__(self, source: nn.Module, config: Any) -> None:
        super().__init__(source)
        from transformers.activations import ACT2FN

        self.num_key_heads, self.num_heads = source.num_k_heads, source.num_v_heads
        self.key_dim, self.value_dim = source.head_k_dim, source.head_v_dim
        self._activate = ACT2FN[source.activation]
        self._beta_scale = 2.0 if getattr(source, "allow_neg_eigval", False) else 1.0
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        sizes = {"q": keys, "k": keys, "v": values}
        self._split_convolution("conv1d", dict(zip(self.CONVOLUTIONS, sizes.values(), strict=True)))
        if hasattr(source, "in_proj_qkv"):
            split_linear(self, "in_proj_qkv", {f"in_proj_{part}": sizes[part] for part in sizes})
        linears = [name for name, one in self.named_children() if isinstance(one, nn.Linear)]
        self.sharding = {**dict.fromkeys(linears, "column"), self.OUTPUT: "row"}

    def plan_shares(self, num_ranks: int) -> None:
        """See StateLayer."""
        self._check_divides(self.num_key_heads, "key heads of linear attention", num_ranks)

    def take_share(self, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
        """See StateLayer."""
        super().take_share(rank, num_ranks, all_reduce)
        self.num_key_heads //= num_ranks
        self.num_heads //= num_ranks
        _shrink(self, num_ranks)

    def list_state_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See StateLayer."""
        shape = (self.num_heads, self.key_dim, self.value_dim)
        return [*super().list_state_shapes(), (shape, torch.float32)]

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """See StateLayer."""
        num_tokens = len(hidden)
        qkv, gate, beta, step = self._project(hidden)
        mixed = self._activate(self._convolve(qkv, context).to(hidden.dtype)).float()
        keys = self.num_key_heads * self.key_dim
        query, key, value = mixed.split([keys, keys, mixed.shape[1] - 2 * keys], dim=1)
        query, key = (
            _scale_to_one(part.reshape(num_tokens, self.num_key_heads, self.key_dim))
            for part in (query, key)
        )
        out = self.recurrence.gated_delta(
            context.spans,
            query * self.key_dim**-0.5,
            key,
            value.reshape(num_tokens, self.num_heads, self.value_dim),
            self._find_decay(step),
            beta.sigmoid().float() * self._beta_scale,
            self.pools[1],
        )
        gate = gate.reshape(-1, self.value_dim)
        normalize, project = getattr(self, self.NORM), getattr(self, self.OUTPUT)
        return project(
            normalize(out.to(hidden.dtype).view(-1, self.value_dim), gate).view(num_tokens, -1)
        )

    def _find_decay(self, step: Tensor) -> Tensor:
        """Of each head, of its time step."""
        rate = functional.softplus(step.float() + self.dt_bias.float())
        return (-self.A_log.float().exp() * rate).exp()

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side; gate; beta and time step of each head."""
        if hasattr(self, "in_proj_qkv"):
            projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
            return tuple(project(hidden) for project in projections)
        # Here each key head has all that belongs to it together.
        num_tokens, repeats = len(hidden), self.num_heads // self.num_key_heads
        values = repeats * self.value_dim
        parts = self.in_proj_qkvz(hidden).view(num_tokens, self.num_key_heads, -1)
        query, key, value, gate = parts.split([self.key_dim, self.key_dim, values, values], dim=-1)
        beta, step = self.in_proj_ba(hidden).view(num_tokens, -1, 2 * repeats).chunk(2, dim=-1)
        qkv = torch.cat([part.flatten(1) for part in (query, key, value)], dim=1)
        return qkv, gate, beta.flatten(1), step.flatten(1)


class OlmoGatedDeltaNet(GatedDeltaNet):
    """OLMo Hybrid's: a matrix for each of what it needs."""

    NORM, OUTPUT = "o_norm", "o_proj"
    CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See GatedDeltaNet."""
        qkv = [project(hidden) for project in (self.q_proj, self.k_proj, self.v_proj)]
        gate, beta, step = self.g_proj(hidden), self.b_proj(hidden), self.a_proj(hidden)
        return torch.cat(qkv, dim=-1), gate, beta, step


class KimiDeltaNet(GatedDeltaNet):
    """Kimi Linear's and Ling 3's: each dimension of a key forgets at a pace of its own.

    How fast, transformers' own small module says.
    """

    NORM, OUTPUT = "o_norm", "o_proj"
    CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")

    def __init__(self, source: nn.Module, config: Any) -> None:
        source.num_k_heads = source.num_v_heads = source.num_heads
        source.head_k_dim = source.head_v_dim = source.head_dim
        super().__init__(source, config)
        names = [name for name, one in self.named_modules() if isinstance(one, nn.Linear)]
        self.sharding = {
            name: "whole" if name.endswith("_a_proj") else "column" for name in names
        } | {self.OUTPUT: "row"}

    def take_share(self, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
        """See StateLayer."""
        super().take_share(rank, num_ranks, all_reduce)
        self.forget_gate.num_heads = self.num_heads
        _shrink(self.forget_gate, num_ranks)

    def _find_decay(self, step: Tensor) -> Tensor:
        """Of each dimension of the keys of each head, of its logarithm."""
        return step.float().exp()

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See GatedDeltaNet; in place of the time steps, logarithms of the decay."""
        qkv = [project(hidden) for project in (self.q_proj, self.k_proj, self.v_proj)]
        is_narrow = hasattr(self, "g_a_proj")
        gate = self.g_b_proj(self.g_a_proj(hidden)) if is_narrow else self.g_proj(hidden)
        return torch.cat(qkv, dim=-1), gate, self.b_proj(hidden), self.forget_gate(hidden[None])[0]


class Mamba2(StateLayer):
    """Of Bamba, Granite 4, Falcon-H1 and Nemotron-H: a state space with one decay a head."""

    def __init__(self, source: nn.Module, config: Any) -> None:
        super().__init__(source)
        from transformers.activations import ACT2FN

        self.num_heads, self.head_dim = source.num_heads, source.head_dim
        self.num_groups, self.state_size = source.n_groups, source.ssm_state_size
        self._activate = ACT2FN[source.activation]
        self._step_limits = source.time_step_limit
        self._heads_per_group = self.num_heads // self.num_groups
        self._first_head = self._first_group = 0
        self._num_norm_groups = self.num_groups
        self._norm_group_size = self.num_heads * self.head_dim // self.num_groups
        self._all_reduce: AllReduce | None = None  # where ranks share a group of the norm
        # Falcon-H1 scales what goes in, and each part of what comes out.
        self._scale = getattr(source, "ssm_in_multiplier", None)
        self._scales = None if self._scale is None else tuple(config.ssm_multipliers)
        inner, states = self.num_heads * self.head_dim, self.num_groups * self.state_size
        sizes = {"z": inner, "x": inner, "b": states, "c": states, "dt": self.num_heads}
        split_linear(self, "in_proj", {f"in_proj_{part}": size for part, size in sizes.items()})
        self._split_convolution("conv1d", {f"conv_{part}": sizes[part] for part in "xbc"})
        self.sharding = {**{f"in_proj_{part}": "column" for part in sizes}, "out_proj": "row"}

    def plan_shares(self, num_ranks: int) -> None:
        """See StateLayer. Few groups stay whole: of them a rank takes what its heads need."""
        self._check_divides(self.num_heads, "Mamba heads", num_ranks)
        if self.num_groups % num_ranks:
            self._check_divides(num_ranks, "ranks", self.num_groups, "groups of Mamba heads")
            self.sharding |= dict.fromkeys(("in_proj_b", "in_proj_c"), "whole")
            self.whole_parts = ("conv_b", "conv_c")

    def take_share(self, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
        """See StateLayer."""
        super().take_share(rank, num_ranks, all_reduce)
        self.num_heads //= num_ranks
        self._first_head = rank * self.num_heads
        if self.whole_parts:
            self._num_norm_groups = 1
            self._all_reduce = all_reduce
        else:
            self.num_groups //= num_ranks
            self._num_norm_groups = self.num_groups
            self._first_group = rank * self.num_groups
        _shrink(self, num_ranks)
        if hasattr(self.norm, "weight"):
            _shrink(self.norm, num_ranks)

    def list_state_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See StateLayer."""
        shape = (self.num_heads, self.head_dim, self.state_size)
        return [*super().list_state_shapes(), (shape, torch.float32)]

    def allocate(self, num_rows: int, device: torch.device, recurrence: Recurrence) -> None:
        """See StateLayer."""
        super().allocate(num_rows, device, recurrence)
        heads = torch.arange(self.num_heads, device=device) + self._first_head
        self._groups = heads // self._heads_per_group - self._first_group

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """See StateLayer."""
        num_tokens = len(hidden)
        if self._scale is not None:
            hidden = hidden * self._scale
        projections = (getattr(self, f"in_proj_{part}") for part in ("z", "x", "b", "c", "dt"))
        parts = [project(hidden) for project in projections]
        if self._scales is not None:
            parts = [part * scale for part, scale in zip(parts, self._scales, strict=True)]
        gate, *mixed, step = parts
        sizes = [part.shape[1] for part in mixed]
        mixed = self._convolve(torch.cat(mixed, dim=1), context).to(hidden.dtype)
        inputs, entry, exit = self._activate(mixed).float().split(sizes, dim=1)
        inputs = inputs.reshape(num_tokens, self.num_heads, self.head_dim)
        entry, exit = (
            part.reshape(num_tokens, -1, self.state_size).contiguous() for part in (entry, exit)
        )
        step = functional.softplus(step.float() + self.dt_bias.float()).clamp(*self._step_limits)
        out = self.recurrence.selective_scan(
            context.spans,
            inputs * step[..., None],
            (-self.A_log.float().exp() * step).exp(),
            entry,
            exit,
            self._groups,
            self.pools[1],
        )
        out = (out + inputs * self.D.float()[:, None]).flatten(1)
        return self.out_proj(self._normalize(out, gate.float()).to(hidden.dtype))

    def _normalize(self, out: Tensor, gate: Tensor) -> Tensor:
        """Gate [num_tokens, this rank's channels], and normalize group by group."""
        gate = functional.silu(gate)
        if not hasattr(self.norm, "weight"):
            return out * gate
        is_norm_first = getattr(self.norm, "norm_before_gate", False)
        if not is_norm_first:
            out = out * gate
        grouped = out.view(len(out), self._num_norm_groups, -1)
        squares = grouped.square().sum(-1, keepdim=True)
        if self._all_reduce is not None:  # [num_tokens, all groups], where only one is this rank's
            group = self._first_head // self._heads_per_group
            sums = squares.new_zeros(len(out), self.num_groups)
            sums[:, group] = squares[:, 0, 0]
            squares = self._all_reduce(sums)[:, group, None, None]
        scale = torch.rsqrt(squares / self._norm_group_size + self.norm.variance_epsilon)
        out = (grouped * scale).flatten(1) * self.norm.weight.float()
        return out * gate if is_norm_first else out


class Mamba1(StateLayer):
    """Jamba's: a state space in which every number decays at a pace of its own."""

    def __init__(self, source: nn.Module, config: Any) -> None:
        super().__init__(source)
        self._num_channels, self._state_size = source.intermediate_size, source.ssm_state_size
        self._step_rank = source.time_step_rank
        parts = ("in_proj_x", "in_proj_z")
        split_linear(self, "in_proj", dict.fromkeys(parts, self._num_channels))
        self._split_convolution("conv1d", {"conv_x": self._num_channels})
        self.sharding = dict.fromkeys((*parts, "dt_proj"), "column")
        self.sharding |= dict.fromkeys(("x_proj", "out_proj"), "row")

    def plan_shares(self, num_ranks: int) -> None:
        """See StateLayer."""
        self._check_divides(self._num_channels, "Mamba channels", num_ranks)

    def take_share(self, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
        """See StateLayer."""
        super().take_share(rank, num_ranks, all_reduce)
        self._num_channels //= num_ranks
        _shrink(self, num_ranks)

    def list_state_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See StateLayer."""
        shape = (self._num_channels, self._state_size)
        return [*super().list_state_shapes(), (shape, torch.float32)]

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """See StateLayer."""
        mixed = self._convolve(self.in_proj_x(hidden), context).to(hidden.dtype)
        mixed = self.act(mixed)
        sizes = [self._step_rank, self._state_size, self._state_size]
        step, entry, exit = self.x_proj(mixed).split(sizes, dim=1)
        step = self.dt_proj(self.dt_layernorm(step)).float()
        inputs = mixed.float()
        out = self.recurrence.channel_scan(
            context.spans,
            inputs,
            functional.softplus(step),
            -self.A_log.float().exp(),
            self.b_layernorm(entry).float(),
            self.c_layernorm(exit).float(),
            self.pools[1],
        )
        out = (out + inputs * self.D.float()) * functional.silu(self.in_proj_z(hidden).float())
        return self.out_proj(out.to(hidden.dtype))


class LightningMixer(StateLayer):
    """MiniMax's: linear attention whose heads forget at paces that config.json tells."""

    def __init__(self, source: nn.Module, config: Any) -> None:
        super().__init__(source)
        self.num_heads, self.head_dim = source.num_attention_heads, source.head_dim
        self._norm_size = self.num_heads * self.head_dim
        self._rates = source.get_slope_rate(device="cpu").flatten()
        self._all_reduce: AllReduce | None = None
        self.sharding = {"qkv_proj": "column", "output_gate": "column", "out_proj": "row"}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """See StateLayer; transformers' layer also returns its state."""
        return super().forward(*args, **kwargs), None

    def plan_shares(self, num_ranks: int) -> None:
        """See StateLayer."""
        self._check_divides(self.num_heads, "heads of linear attention", num_ranks)

    def take_share(self, rank: int, num_ranks: int, all_reduce: AllReduce) -> None:
        """See StateLayer."""
        self.num_heads //= num_ranks
        self._rates = self._rates[rank * self.num_heads :][: self.num_heads]
        self._all_reduce = all_reduce
        _shrink(self.norm, num_ranks)

    def list_state_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See StateLayer; there is no convolution."""
        return [((self.num_heads, self.head_dim, self.head_dim), torch.float32)]

    def allocate(self, num_rows: int, device: torch.device, recurrence: Recurrence) -> None:
        """See StateLayer."""
        self.recurrence = recurrence
        ((shape, dtype),) = self.list_state_shapes()
        self.pools = (torch.zeros((num_rows, *shape), dtype=dtype, device=device),)
        self._decay = (-self._rates).exp().to(device)
        self._groups = torch.arange(self.num_heads, device=device)

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """See StateLayer."""
        qkv = self.act_fn(self.qkv_proj(hidden)).view(len(hidden), self.num_heads, -1).float()
        query, key, value = qkv.split(self.head_dim, dim=-1)
        decay = self._decay.expand(len(hidden), -1)
        out = self.recurrence.selective_scan(
            context.spans, value, decay, key, query, self._groups, self.pools[0]
        )
        out = out.flatten(1).to(hidden.dtype).float()
        squares = out.square().sum(-1, keepdim=True)
        if self._all_reduce is not None:
            squares = self._all_reduce(squares)
        scale = torch.rsqrt(squares / self._norm_size + self.norm.variance_epsilon)
        out = self.norm.weight * (out * scale).to(hidden.dtype)
        return self.out_proj(self.output_gate(hidden).sigmoid() * out)


LAYERS: dict[str, type[StateLayer]] = {
    "Lfm2ShortConv": ShortConvolution,
    "Lfm2MoeShortConv": ShortConvolution,
    "Lfm3ShortConv": ShortConvolution,
    "Qwen3NextGatedDeltaNet": GatedDeltaNet,
    "Qwen3_5GatedDeltaNet": GatedDeltaNet,
    "Qwen3_5MoeGatedDeltaNet": GatedDeltaNet,
    "OlmoHybridGatedDeltaNet": OlmoGatedDeltaNet,
    "KimiLinearDeltaAttention": KimiDeltaNet,
    "BailingHybridDeltaAttention": KimiDeltaNet,
    "BambaMixer": Mamba2,
    "GraniteMoeHybridMambaLayer": Mamba2,
    "FalconH1Mixer": Mamba2,
    "NemotronHMamba2Mixer": Mamba2,
    "JambaMambaMixer": Mamba1,
    "MiniMaxLightningAttention": LightningMixer,
}
"""Transformers' classes, and what takes their place."""


def replace_state_layers(model: nn.Module) -> None:
    """Put ours in the place of transformers' layers; on the meta device, before sharding."""
    if int(metadata.version("transformers").split(".")[0]) < 5:
        return  # its layers have other parts, and are refused for attending nowhere
    for name, module in list(model.named_modules()):
        if (kind := LAYERS.get(type(module).__name__)) is not None:
            model.set_submodule(name, kind(module, model.config.get_text_config()))


def list_state_layers(model: nn.Module) -> list[StateLayer]:
    """Those of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, StateLayer)]


def allocate_states(
    model: nn.Module, num_rows: int, device: torch.device, recurrence: Recurrence
) -> None:
    """Make the pools of all layers, with so many rows; once the weights are loaded."""
    for layer in list_state_layers(model):
        layer.allocate(num_rows, device, recurrence)


def copy_states(layers: Sequence[StateLayer], copies: Sequence[int]) -> None:
    """Copy the states of rows to other rows, in order; see `Batch.state_copies`."""
    for source, target in zip(copies[::2], copies[1::2], strict=True):
        for layer in layers:
            for pool in layer.pools:
                pool[target] = pool[source]


def find_state_layer(model: nn.Module, name: str) -> tuple[StateLayer, str] | None:
    """The state layer that a module lies in, and the module's name there."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        layer = model.get_submodule(".".join(parts[:count]))
        if isinstance(layer, StateLayer):
            return layer, ".".join(parts[count:])
    return None


def _shrink(module: nn.Module, num_ranks: int) -> None:
    """Keep one of so many parts of each of a module's own parameters; on the meta device.

    That is, of their first dimension that is more than 1.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        shape = list(parameter.shape)
        axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
        shape[axis] //= num_ranks
        part = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
        setattr(module, name, part)


def _scale_to_one(vectors: Tensor) -> Tensor:
    """Divide [..., size] by its length."""
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + L2_EPSILON)
