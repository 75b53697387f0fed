"""Stacked experts in MXFP4, as gpt-oss is published: e2m1 codes, a power of two for each 32. Every
rank.

A stack `X_blocks` is uint8 `[experts, rows, groups, 16]`, two codes a byte, the earlier in the low
half; `X_scales` is uint8 `[experts, rows, groups]`, exponents with a bias of 127. In `gate_up_proj`
a row of gate and one of up come in turn. Each expert's matrices become weights of their own.

No format here has a scale for 32 weights. `fp6` (e3m2) with a power of two for 64 holds each number
of both halves exactly where the halves' scales differ by a factor of at most 32, which neighbours
hardly ever exceed; what does is rounded, and counted as a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import Format, LowBitError
from autotp_serving.low_bit.tensor import LowBitTensor
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Range, Read, as_format
from autotp_serving.model.stored_tensors import StoredTensor
from autotp_serving.model_folder import read_object

GROUP = 32
GROUP_BYTES = 16
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAN_SCALE = 255
LARGEST_SAFE_SCALE = 252
"""Six times this is a float32."""

SCALE_BIAS = 127

BLOCKS, SCALES = "_blocks", "_scales"
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The matrices that take turns in the rows of a stack."""

FAMILY = "gpt_oss"
MAX_EXPERTS = 2**12


@dataclass(frozen=True)
class Mxfp4Weight:
    """One matrix of one expert.

    Attributes:
        stack: name of the stored tensors, without what they end in.
        expert: its number.
        first_row: of the matrix, in the stack.
        step: its rows are every so many of the stack's.
        has_power_of_two_scales: see QuantizedWeight.
    """

    stack: str
    expert: int
    first_row: int
    step: int
    shape: tuple[int, int]
    has_power_of_two_scales: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """See QuantizedWeight."""
        return self.stack + BLOCKS, self.stack + SCALES

    @property
    def format(self) -> Format | None:
        """See QuantizedWeight."""
        return None

    @property
    def fallback(self) -> Format:
        """See QuantizedWeight."""
        return as_format("fp6")

    def repack(self, read: Read, rows: Range, cols: Range) -> LowBitTensor:
        """No format takes it as it is."""
        raise LowBitError("MXFP4 has no format of its own here")

    def decode(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See QuantizedWeight."""
        first, last = (self.first_row + row * self.step for row in (rows[0], rows[1] - 1))
        groups = (cols[0] // GROUP, -(-cols[1] // GROUP))
        place = ((self.expert, self.expert + 1), (first, last + 1), groups)
        codes = read(self.stack + BLOCKS, (*place, (0, GROUP_BYTES)))[0, :: self.step]
        scales = read(self.stack + SCALES, place)[0, :: self.step]
        if (scales == NAN_SCALE).any():
            raise LowBitError(f"{self.stack}{SCALES} holds NaN")
        levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)])
        every = torch.arange(256)
        # The two numbers of a byte, looked up as if they were one of 64 bits.
        pairs = torch.stack((levels[every & 15], levels[every >> 4]), dim=-1).view(torch.int64)
        powers = torch.tensor([2.0 ** (code - SCALE_BIAS) for code in range(NAN_SCALE)])
        values = pairs.flatten().index_select(0, codes.flatten().int()).view(torch.float32)
        values = values.view(*scales.shape, GROUP)
        values *= powers.index_select(0, scales.flatten().int()).view(*scales.shape, 1)
        if (scales > LARGEST_SAFE_SCALE).any() and not values.isfinite().all():
            raise LowBitError(f"{self.stack}{SCALES} holds scales too large for float32")
        return values.flatten(1)


def find_mxfp4_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], _: Read
) -> dict[str, QuantizedWeight]:
    """All experts' matrices in MXFP4 of a folder.

    Raises:
        ConfigError: another family, or names, types or shapes that are not read here.
    """
    family = read_object(quantization.source).get("model_type")
    if family != FAMILY:
        raise quantization.refuse(
            f"mxfp4 is read for the family '{FAMILY}' alone, not for {family!r:.60}, whose rows "
            "may have another order"
        )
    found: dict[str, QuantizedWeight] = {}
    for name in stored:
        if name.endswith(BLOCKS):
            found |= _split_stack(quantization, name.removesuffix(BLOCKS), stored)
    if not found:
        raise quantization.refuse(
            f"quant_method is 'mxfp4', and no tensor's name ends in {BLOCKS}",
            "take quantization_config out of config.json, if the weights are in 16 bits",
        )
    return found


def _split_stack(
    quantization: Quantization, stack: str, stored: dict[str, StoredTensor]
) -> dict[str, QuantizedWeight]:
    """The matrices of all experts in a stack, by the names that they have as single ones."""
    module, _, last = stack.rpartition(".")
    blocks, scales = stored[stack + BLOCKS], stored.get(stack + SCALES)
    parts = PARTS.get(last, ())
    if scales is None or not parts or {blocks.dtype, scales.dtype} != {"U8"}:
        raise quantization.refuse(
            f"{stack}{BLOCKS} ({blocks.dtype}) is no stack of experts in MXFP4 with its "
            f"{SCALES} beside it, both of type U8"
        )
    fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, GROUP_BYTES)
    if not fits or 0 in blocks.shape or blocks.shape[1] % len(parts):
        raise quantization.refuse(
            f"{stack}{BLOCKS} has shape {list(blocks.shape)}, which does not fit its scales' "
            f"{list(scales.shape)}, or is none of {len(parts)} matrices for each expert"
        )
    num_experts, num_rows, num_groups, _ = blocks.shape
    if num_experts > MAX_EXPERTS:
        raise quantization.refuse(f"{stack} has {num_experts} experts, more than {MAX_EXPERTS}")
    shape = (num_rows // len(parts), num_groups * GROUP)
    return {
        f"{module}.{expert}.{part}.weight": Mxfp4Weight(stack, expert, row, len(parts), shape)
        for expert in range(num_experts)
        for row, part in enumerate(parts)
    }
