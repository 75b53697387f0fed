"""What lies between a layer's products, by csrc/activations.cu. Ranks on CUDA.

Everything is bfloat16 and rounded where transformers' own code rounds. Products of few tokens with
an integer format take 8-bit integers with a scale per 64, by the rule of the CPU's kernels; they
are written here, where the numbers are made, in the order that the products read. Products of
many tokens take bfloat16, of what those integers stand for, plainly or in the order of
csrc/wide_products.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.nvrtc import Kernel, Long, load_kernel
from autotp_serving.low_bit.formats import BLOCK

SOURCE = "activations.cu"
TOKENS = 8
CHUNK = 8
THREADS = 256
HEADS_OF_THREAD = 3


class Rounding(Enum):
    """What a product takes: numbers as they are, 8-bit integers, or what those stand for; and the
    first and the last in the order of csrc/wide_products.cu.
    """

    NONE = 0
    INTEGERS = 1
    VALUES = 2
    WIDE = 3
    WIDE_VALUES = 4

    @property
    def is_wide(self) -> bool:
        """Whether it is in that order."""
        return self in (Rounding.WIDE, Rounding.WIDE_VALUES)

    @property
    def way(self) -> int:
        """What csrc/quantize.cuh calls it, where it is bfloat16."""
        is_rounded = self in (Rounding.VALUES, Rounding.WIDE_VALUES)
        return is_rounded + 2 * self.is_wide


@dataclass(frozen=True)
class Activations:
    """Activations [num_tokens, columns] as a product takes them.

    Attributes:
        plain: bfloat16 [num_tokens, columns], or None where `codes` or `wide` are there.
        codes: uint8 [token tiles, blocks, 8, 64], tiles of 8 tokens; see csrc/activations.cu.
        scales, sums: float32 [token tiles, blocks, 8]: what a code is worth, and the block's sum.
        wide: bfloat16 [blocks, token tiles, 8, 64]; see csrc/activations.cu.
    """

    num_tokens: int
    columns: int
    plain: Tensor | None
    codes: Tensor | None = None
    scales: Tensor | None = None
    sums: Tensor | None = None
    wide: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(x for x in (self.plain, self.codes, self.wide) if x is not None).device

    @property
    def numbers(self) -> Tensor | None:
        """The bfloat16, in either order."""
        return self.plain if self.wide is None else self.wide

    def slice(self, start: int, stop: int) -> Activations:
        """Tokens `start` to `stop` as views; `start` is a multiple of 8."""
        if start == 0 and stop == self.num_tokens:
            return self
        if self.plain is not None:
            return Activations(stop - start, self.columns, self.plain[start:stop])
        tiles = slice(start // TOKENS, -(-stop // TOKENS))
        parts = (self.codes[tiles], self.scales[tiles], self.sums[tiles])
        return Activations(stop - start, self.columns, None, *parts)

    @staticmethod
    def empty(
        num_tokens: int, columns: int, rounding: Rounding, device: torch.device
    ) -> Activations:
        """Memory for them; nothing is written yet. Blocks are whole where there are any."""
        if rounding in (Rounding.NONE, Rounding.VALUES):
            plain = torch.empty(num_tokens, columns, dtype=torch.bfloat16, device=device)
            return Activations(num_tokens, columns, plain)
        tiles, blocks = -(-num_tokens // TOKENS), columns // BLOCK
        if rounding.is_wide:
            wide = torch.empty(blocks, tiles, TOKENS, BLOCK, dtype=torch.bfloat16, device=device)
            return Activations(num_tokens, columns, None, wide=wide)
        sizes = (tiles, blocks, TOKENS)
        return Activations(
            num_tokens,
            columns,
            None,
            torch.empty(*sizes, BLOCK, dtype=torch.uint8, device=device),
            torch.empty(sizes, dtype=torch.float32, device=device),
            torch.empty(sizes, dtype=torch.float32, device=device),
        )


def quantize_tokens(x: Tensor, rounding: Rounding) -> Activations:
    """Round x [num_tokens, columns] bfloat16, whose last dimension is contiguous."""
    num_tokens, columns = x.shape
    if rounding is Rounding.NONE:
        return Activations(num_tokens, columns, x)
    to = Activations.empty(num_tokens, columns, rounding, x.device)
    _kernel("quantize_tokens", x)(
        (num_tokens, -(-columns // (CHUNK * THREADS))),
        THREADS,
        (
            *(x, Long(columns), Long(x.stride(0))),
            *(to.codes, to.scales, to.sums, to.numbers, rounding.way),
        ),
    )
    return to


def silu_multiply(gate_up: Tensor, bias: Tensor | None, rounding: Rounding) -> Activations:
    """silu(gate) * up of [num_tokens, 2 * size] bfloat16, plus `bias` [2 * size] before."""
    num_tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    to = Activations.empty(num_tokens, columns, rounding, gate_up.device)
    _kernel("silu_multiply", gate_up)(
        (num_tokens, -(-columns // (CHUNK * THREADS))),
        THREADS,
        (
            *(gate_up, bias, Long(columns)),
            *(to.codes, to.scales, to.sums, to.numbers, rounding.way),
        ),
    )
    return to


@dataclass(frozen=True)
class Rotation:
    """How a layer's heads are rotated.

    Attributes:
        cos, sin: [longest, head_dim] bfloat16, a row per position.
        query_norm, key_norm: [head_dim] bfloat16 weights of heads' RMS norms, or None.
        bias: of queries, keys and values together, or None.
    """

    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    epsilon: float
    bias: Tensor | None


@dataclass(frozen=True)
class HeadsEnd:
    """What queries, keys and values are subject to after their product.

    Attributes:
        positions: [num_tokens] int64.
        slots: [num_tokens] int64; None with `pools` None, and -1: keys and values stay in place.
        pools: keys and values [num_slots, num_kv_heads, head_dim] bfloat16.
    """

    rotation: Rotation
    positions: Tensor
    num_heads: int
    num_kv_heads: int
    slots: Tensor | None
    pools: tuple[Tensor, Tensor] | None


def rotate_and_store(qkv: Tensor, end: HeadsEnd) -> None:
    """Bias, norms and rotation: queries in place, keys and values to their slots of the cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] bfloat16; head_dim is a
            multiple of 8 and at most 256.
    """
    rotation = end.rotation
    head_dim = rotation.cos.shape[1]
    all_heads = end.num_heads + 2 * end.num_kv_heads
    span = 1 << (head_dim // 8 - 1).bit_length()
    heads = THREADS // span * HEADS_OF_THREAD
    keys, values = end.pools or (None, None)
    _kernel("rotate_and_store", qkv)(
        (qkv.shape[0], -(-all_heads // heads)),
        THREADS,
        (
            *(qkv, rotation.bias, rotation.query_norm, rotation.key_norm, float(rotation.epsilon)),
            *(end.positions, rotation.cos, rotation.sin, end.slots, keys, values),
            *(end.num_heads, end.num_kv_heads, head_dim, span),
        ),
    )


def _kernel(name: str, tensor: Tensor) -> Kernel:
    return load_kernel(SOURCE, name, (), tensor.device.index)
