"""What a decoder layer does between its matrices, by csrc/layer_ops.cpp. Every rank on CPU.

On bfloat16, for AVX-512 and AVX2. A token's result depends on that token alone.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from autotp_serving.devices.build import BuildError, best_isa, build_library, isa_flags
from autotp_serving.kernels.cpu.attention import PoolPointers
from autotp_serving.kernels.kv_pools import Pools

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "layer_ops.cpp"


class Rotation(ctypes.Structure):
    """AutotpRotation of csrc/layer_ops.cpp."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("pools", PoolPointers),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
    )


class LayerOps:
    """The compiled operations. All tensors are dense bfloat16 on CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._rms_norm = library.autotp_rms_norm
        self._rms_norm.argtypes = (*(pointer,) * 4, number, number, ctypes.c_float, number)
        self._rms_norm.restype = None
        self._rotate_and_store = library.autotp_rotate_and_store
        self._rotate_and_store.argtypes = (pointer, number)
        self._rotate_and_store.restype = None
        self._silu_multiply = library.autotp_silu_multiply
        self._silu_multiply.argtypes = (pointer, pointer, number, number, number)
        self._silu_multiply.restype = None
        self.add_adapters = library.autotp_add_adapters  # see adapters.py
        self.add_adapters.argtypes = (
            *(pointer, number, pointer),
            *(pointer, number, pointer, number, number),
        )
        self.add_adapters.restype = None
        # Two addresses, of a layer and of a step: see layers.py.
        self.attention_half = library.autotp_attention_half
        self.attention_half.argtypes = (pointer, pointer, number)
        self.mlp_half = library.autotp_mlp_half
        self.mlp_half.argtypes = (pointer, pointer)

    def rms_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Norm each row; where `added` is given, `x += added` comes first.

        Args:
            x: [num_tokens, size], a multiple of 16; altered where `added` is given.
            added: of the same shape, or None.
            weight: [size].

        Returns:
            weight * x / rms(x), a new tensor.
        """
        rows, cols = x.shape
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(),
            None if added is None else added.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            cols,
            epsilon,
            torch.get_num_threads(),
        )
        return out

    def rotate_and_store(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        pools: Pools,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> None:
        """Norm where asked for, and rotate, queries and keys; store keys and values in the cache.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; its queries and keys are
                altered.
            rotary: cos and sin, [num_tokens, head_dim], a multiple of 32.
            slots: [num_tokens] int64.
            pools: a layer's, as `cpu_attention.pool_shapes` has them.
            norms: of queries and of keys, [head_dim] each, and their epsilon.
        """
        cos, sin = rotary
        num_kv_heads, head_dim = pools.keys.shape[1], 2 * pools.keys.shape[2]
        query_norm, key_norm, epsilon = norms or (None, None, 0.0)
        call = Rotation(
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            PoolPointers.of(pools),
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(),
            qkv.shape[0],
            qkv.shape[1] // head_dim - 2 * num_kv_heads,
            num_kv_heads,
            head_dim,
            epsilon,
        )
        self._rotate_and_store(ctypes.addressof(call), torch.get_num_threads())

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of [num_tokens, 2 * size], gate first; the size is a multiple of 16."""
        rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, cols)
        self._silu_multiply(gate_up.data_ptr(), out.data_ptr(), rows, cols, torch.get_num_threads())
        return out


@functools.cache
def load_layer_ops(isa: str | None = None) -> LayerOps | None:
    """The operations for the best instruction set here (or the named one).

    None, and a line in the log, where there are none.
    """
    try:
        flags = isa_flags(isa or best_isa())
        return LayerOps(ctypes.CDLL(str(build_library("layer_ops", SOURCE, flags))))
    except (BuildError, OSError) as error:
        logger.warning("Layers run operation by operation in torch, slowly: %s", error)
        return None
