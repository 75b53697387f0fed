"""Whole halves of decoder layers in one call each, by csrc/layer_ops.cpp. Every rank on CPU.

For layers whose every product is a kernel of ours: a small model's step is short enough for the
way from Python into C++, thirteen times a layer, to show. What is computed is what `LayerOps`,
`CpuMatmul`, `DenseMatmul` and `CpuAttention` compute one by one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.cpu.adapters import AdapterRuns, CpuAdapters
from autotp_serving.kernels.cpu.attention import CpuAttention, PoolPointers
from autotp_serving.kernels.cpu.dense import DenseMatmul
from autotp_serving.kernels.cpu.layer_ops import LayerOps, Rotation
from autotp_serving.kernels.cpu.linear import CpuMatmul
from autotp_serving.kernels.kv_pools import Pools


class _Product(ctypes.Structure):
    """AutotpProduct of csrc/layer_ops.cpp."""

    _fields_ = (
        ("multiply", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("num_parts", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    """AutotpLayer of csrc/layer_ops.cpp."""

    _fields_ = (
        ("qkv", _Product),
        ("output", _Product),
        ("gate_up", _Product),
        ("down", _Product),
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("input_epsilon", ctypes.c_float),
        ("mlp_epsilon", ctypes.c_float),
        ("rotation", Rotation),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    """AutotpStep of csrc/layer_ops.cpp."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("attention", ctypes.c_void_p),
        ("attend", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("joined", ctypes.c_void_p),
        ("narrowed", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Product:
    """A product and its bias [rows] or None; `finish` all-reduces a part in place and
    adds what is added once. In a joined product there is nothing to finish. `adapters` add to it.
    """

    matmul: CpuMatmul | DenseMatmul
    bias: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    adapters: CpuAdapters | None = None

    def describe(self) -> _Product:
        """As C++ takes it."""
        return _Product(
            self.matmul.function,
            ctypes.addressof(self.matmul.weights),
            len(self.matmul.weights),
            self.matmul.rows,
            self.matmul.cols,
            None if self.bias is None else self.bias.data_ptr(),
            None if self.adapters is None else self.adapters.address,
            0 if self.adapters is None else self.adapters.num_parts,
        )


@dataclass(frozen=True)
class NativeLayer:
    """What the two calls for a layer need; norms are [size] weights and their epsilons.

    Attributes:
        head_norms: of queries and of keys, [head_dim] each, and their epsilon, or None.
        pools: the layer's keys and values in the cache.
    """

    qkv: Product
    output: Product
    gate_up: Product
    down: Product
    input_norm: tuple[Tensor, float]
    mlp_norm: tuple[Tensor, float]
    head_norms: tuple[Tensor, Tensor, float] | None
    pools: Pools
    scaling: float
    sliding_window: int | None

    def describe(self) -> _Layer:
        """As C++ takes it."""
        num_kv_heads, head_dim = self.pools.keys.shape[1], 2 * self.pools.keys.shape[2]
        query_norm, key_norm, epsilon = self.head_norms or (None, None, 0.0)
        rotation = Rotation(
            pools=PoolPointers.of(self.pools),
            query_norm=None if query_norm is None else query_norm.data_ptr(),
            key_norm=None if key_norm is None else key_norm.data_ptr(),
            heads=self.qkv.matmul.rows // head_dim - 2 * num_kv_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            epsilon=epsilon,
        )
        return _Layer(
            self.qkv.describe(),
            self.output.describe(),
            self.gate_up.describe(),
            self.down.describe(),
            self.input_norm[0].data_ptr(),
            self.mlp_norm[0].data_ptr(),
            self.input_norm[1],
            self.mlp_norm[1],
            rotation,
            self.scaling,
            self.sliding_window or 0,
        )


class NativeLayers:
    """Runs all layers of a model, two calls each."""

    def __init__(self, ops: LayerOps, layers: list[NativeLayer]) -> None:
        self._ops = ops
        self._layers = layers
        self._described = [layer.describe() for layer in layers]
        self._calls = [
            (ctypes.addressof(described), layer.output.finish, layer.down.finish)
            for described, layer in zip(self._described, layers, strict=True)
        ]
        self._widest_joined = max(max(x.qkv.matmul.rows, x.gate_up.matmul.rows) for x in layers)
        self._widest_narrowed = max(max(x.output.matmul.cols, x.down.matmul.cols) for x in layers)

    def run(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        attention: CpuAttention,
        adapter_runs: AdapterRuns | None = None,
    ) -> Tensor:
        """Run the step's tokens through every layer.

        Args:
            hidden: [num_tokens, size] bfloat16; altered.
            rotary: cos and sin, [num_tokens, head_dim].
            slots: [num_tokens] int64.
            adapter_runs: the tokens with adapters; None where there are none.

        Returns:
            What is still to be added to `hidden`, of its shape.

        Raises:
            MemoryError: there is none for a kernel's own needs.
        """
        num_tokens = len(hidden)
        out, normed = torch.empty_like(hidden), torch.empty_like(hidden)
        joined = hidden.new_empty(num_tokens * self._widest_joined)
        narrowed = hidden.new_empty(num_tokens * self._widest_narrowed)
        step = _Step(
            num_tokens,
            torch.get_num_threads(),
            hidden.data_ptr(),
            out.data_ptr(),
            rotary[0].data_ptr(),
            rotary[1].data_ptr(),
            slots.data_ptr(),
            attention.address,
            attention.function,
            normed.data_ptr(),
            joined.data_ptr(),
            narrowed.data_ptr(),
            None if adapter_runs is None else adapter_runs.address,
        )
        address = ctypes.addressof(step)
        attention_half, mlp_half = self._ops.attention_half, self._ops.mlp_half
        adds = 0
        for layer, finish_output, finish_down in self._calls:
            failed = attention_half(layer, address, adds)
            finish_output(out)
            failed |= mlp_half(layer, address)
            finish_down(out)
            if failed:
                raise MemoryError(f"no memory to run {num_tokens} tokens")
            adds = 1
        return out
