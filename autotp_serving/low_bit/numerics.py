"""How 64 numbers become codes and a scale, and back, per kind of format. Same on all ranks.

Everything is float32 and integer arithmetic in separate steps, so each device gives the same
bytes: no float64 (Arc A-series has none), no fused multiply-add, and divisors are tensors because
CUDA turns division by a Python number into multiplication by its rounded reciprocal. Whole-size
`where`, `trunc` and `bucketize` are left out: on CPU they take 5 to 30 times as long as the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import Format, LowBitError

FLOAT16_MAX = 65504.0


class Blocks(NamedTuple):
    """Codes of `[n, 64]` weights with their scales: what is packed, before it is packed.

    `codes` uint8 `[n, 64]` (two's complement in sym_int8); `scales` and `mins` `[n, 1]` in the
    format's dtype, or None; `peak` 0-dim float32, the largest magnitude seen (NaN if any was).
    """

    codes: Tensor
    scales: Tensor | None
    mins: Tensor | None
    peak: Tensor


def encode(weights: Tensor, format: Format, power_of_two_scales: bool = False) -> Blocks:
    """Quantize float32 `[n, 64]`, each row one block. Look at `peak` before trusting the codes."""
    if power_of_two_scales and format.kind == "minifloat" and format.scale_dtype is not None:
        return _encode_with_powers(weights, format)
    encoders = {
        "symmetric": _encode_symmetric,
        "asymmetric": _encode_asymmetric,
        "table": _encode_table,
        "minifloat": _encode_minifloat,
    }
    return encoders[format.kind](weights, format)


def decode(codes: Tensor, scales: Tensor | None, mins: Tensor | None, format: Format) -> Tensor:
    """Turn uint8 codes `[n, 64]` into float32 `[n, 64]`."""
    if format.kind == "table":
        levels = torch.tensor(format.levels, dtype=torch.float32, device=codes.device)
        values = levels.index_select(0, codes.flatten().int()).view_as(codes)
    elif format.kind == "minifloat":
        values = _decode_minifloat(codes, format)
    elif format.code_bits == 8:
        values = codes.view(torch.int8).float()
    else:
        values = codes.float()
        if format.kind == "symmetric":
            values -= 2 ** (format.code_bits - 1)
    if scales is not None:
        values *= scales
    if mins is not None:
        values += mins
    return values


def largest_weight(format: Format) -> float:
    """Largest magnitude whose block still has finite scales, mins and codes."""
    if format.scale_dtype is None:
        return format.largest_level
    if format.scale_dtype == "float32":
        return 1e38
    if format.kind == "symmetric":
        return FLOAT16_MAX * 2 ** (format.code_bits - 1)
    if format.kind == "asymmetric":
        return FLOAT16_MAX
    return FLOAT16_MAX * format.largest_level


def check_peak(peak: float, format: Format) -> None:
    """Raise LowBitError when a weight was NaN, infinite or too large for `format`."""
    if peak != peak or peak == float("inf"):
        raise LowBitError("the weight holds NaN or infinity")
    if peak > largest_weight(format):
        raise LowBitError(
            f"the weight holds {peak:.6g}, too large for {format.name}: at most "
            f"{largest_weight(format):.6g}"
        )


def _encode_symmetric(weights: Tensor, format: Format) -> Blocks:
    """Codes around 2**(bits - 1): the weight of largest magnitude gets code 0 (ggml's q4_0, q5_0).

    sym_int8 is ggml's q8_0: codes -127 to 127, halves away from zero.
    """
    highest, lowest = weights.amax(1, keepdim=True), weights.amin(1, keepdim=True)
    magnitude = torch.maximum(highest, -lowest)
    if format.code_bits == 8:
        scales = magnitude / torch.full_like(magnitude[:1], 127.0)
        scaled = weights * _reciprocal(scales)
        # The largest float below a half: adding a half itself would take 0.49999997 up to 1.
        scaled += torch.sign(scaled).mul_(0.49999997)
        return Blocks(_truncate(scaled), scales, None, magnitude.max())
    half = 2 ** (format.code_bits - 1)
    extreme = torch.where(highest > -lowest, highest, lowest)
    tied = ((highest == -lowest) & (highest > 0)).flatten().nonzero().flatten()
    if len(tied):
        # Both signs reach the largest magnitude: the first of them decides, as in ggml's loop.
        rows = weights[tied]
        first = (rows.abs() == magnitude[tied]).to(torch.uint8).argmax(1, keepdim=True)
        extreme[tied] = rows.gather(1, first)
    scales = extreme * (-1.0 / half)
    codes = (weights * _reciprocal(scales)).add_(half + 0.5).clamp_(0, 2 * half - 1)
    return Blocks(_truncate(codes), scales.half(), None, magnitude.max())


def _encode_asymmetric(weights: Tensor, format: Format) -> Blocks:
    """Codes 0 to 2**bits - 1 from the smallest to the largest weight (ggml's q4_1, q5_1)."""
    highest, lowest = weights.amax(1, keepdim=True), weights.amin(1, keepdim=True)
    steps = 2**format.code_bits - 1
    scales = (highest - lowest) / torch.full_like(highest[:1], steps)
    codes = (weights - lowest).mul_(_reciprocal(scales)).add_(0.5).clamp_(0, steps)
    peak = torch.maximum(highest, -lowest).max()
    return Blocks(_truncate(codes), scales.half(), lowest.half(), peak)


def _encode_table(weights: Tensor, format: Format) -> Blocks:
    """The nearest level to weight / largest magnitude; halves go to the lower one."""
    magnitude = torch.maximum(weights.amax(1, keepdim=True), -weights.amin(1, keepdim=True))
    codes = _table_codes(weights * _reciprocal(magnitude), format)
    return Blocks(codes, magnitude.half(), None, magnitude.max())


def _table_codes(scaled: Tensor, format: Format) -> Tensor:
    """How many of the format's boundaries lie below each number from -1 to 1.

    Cells of 1/32 hold one boundary at most: a look-up says how many lie below the cell and which
    one comes next, and one comparison settles it. Fifteen comparisons take nf4 twice as long.
    """
    per_unit = 32
    below = [
        sum(boundary < cell / per_unit - 1 for boundary in format.boundaries)
        for cell in range(2 * per_unit + 1)
    ]
    following = [(*format.boundaries, torch.inf)[count] for count in below]
    # Clamped for the sake of NaN, which is reported later.
    cells = ((scaled + 1) * per_unit).int().clamp_(0, 2 * per_unit).flatten()
    counts = torch.tensor(below, dtype=torch.uint8, device=scaled.device)
    bounds = torch.tensor(following, dtype=torch.float32, device=scaled.device)
    above = scaled > bounds.index_select(0, cells).view_as(scaled)
    return counts.index_select(0, cells).view_as(scaled).add_(above)


def _encode_minifloat(weights: Tensor, format: Format) -> Blocks:
    """The nearest small float, halves to the even code; the largest magnitude gets the last code.

    ipex-llm cuts the lower bits off instead, which shrinks weights by 4 % (fp8_e4m3) to 8 %
    (fp8_e5m2, fp6) on average, and sends fp4's 0.75 to 1 down to 0.5.
    """
    magnitude = torch.maximum(weights.amax(1, keepdim=True), -weights.amin(1, keepdim=True))
    largest = torch.full_like(magnitude[:1], format.largest_level)
    if format.scale_dtype is None:
        return Blocks(_minifloat_codes(weights, format), None, None, magnitude.max())
    if format.scale_dtype == "float32":
        # The detour over the inverse gives ipex-llm's scales to the last bit.
        inverses = _finite(largest / magnitude)
        scales = _reciprocal(inverses)
    else:
        scales = magnitude / largest
        inverses = _reciprocal(scales)
        scales = scales.half()
    scaled = weights * (inverses / format.level_unit)
    return Blocks(_minifloat_codes(scaled, format), scales, None, magnitude.max())


def _encode_with_powers(weights: Tensor, format: Format) -> Blocks:
    """The same with the smallest power of two for a scale that takes the largest magnitude.

    What has few enough significant bits, and lies in reach below the largest, stays as it is.
    """
    magnitude = torch.maximum(weights.amax(1, keepdim=True), -weights.amin(1, keepdim=True))
    tight = magnitude / torch.full_like(magnitude[:1], format.largest_level)
    mantissas, exponents = torch.frexp(tight)
    exponents -= (mantissas == 0.5).int()
    is_half = format.scale_dtype == "float16"
    lowest, highest = (-24, 15) if is_half else (-126, 126)
    powers = ((exponents.clamp(lowest, highest) + 127) << 23).view(torch.float32)
    # Above the largest power that the scales' type has, other numbers are left.
    scales = torch.where(exponents > highest, tight, powers)
    codes = _minifloat_codes(weights * (_reciprocal(scales) / format.level_unit), format)
    return Blocks(codes, scales.half() if is_half else scales, None, magnitude.max())


def _minifloat_codes(levels: Tensor, format: Format) -> Tensor:
    """Round float32 levels to the nearest that the top bits of a float16 can hold, halves to even.

    Adding and subtracting 1.5 * 2**(23 - mantissa bits) times a number's power of two lets the
    float32 adder do the rounding. Below float16's smallest normal, 2**-14, steps stay even.
    """
    kept = format.mantissa_bits
    powers = levels.abs().clamp_(min=2.0**-14).view(torch.int32) & 0x7F800000
    anchors = powers.view(torch.float32).mul_(1.5 * 2 ** (23 - kept))
    bits = (levels + anchors).sub_(anchors).half().view(torch.int16)
    magnitude = (bits >> (10 - kept)) & _largest_code(format)
    sign = (bits >> (16 - format.code_bits)) & (1 << (format.code_bits - 1))
    return (magnitude | sign).to(torch.uint8)


def _decode_minifloat(codes: Tensor, format: Format) -> Tensor:
    """The float32 levels of uint8 codes, same shape."""
    kept = format.mantissa_bits
    # The sign goes to the top, and the shift back brings copies of it that the mask takes away.
    bits = (codes.to(torch.int16) << (16 - format.code_bits)) >> (6 + kept - format.code_bits)
    bits &= -0x8000 | (_largest_code(format) << (10 - kept))
    return bits.view(torch.float16).float().mul_(format.level_unit)


def _largest_code(format: Format) -> int:
    """The code without its sign bit, all ones."""
    return 2 ** (format.code_bits - 1) - 1


def _truncate(codes: Tensor) -> Tensor:
    """Float32 codes, fractions dropped, as uint8; by way of int8, for which CPUs have code."""
    return codes.to(torch.int8).view(torch.uint8)


def _reciprocal(values: Tensor) -> Tensor:
    """1 / values, and 0 where that is not finite: a block of zeros keeps its codes at zero."""
    return _finite(torch.reciprocal(values))


def _finite(values: Tensor) -> Tensor:
    """`values` with 0 in place of infinity and NaN."""
    return torch.where(values.isfinite(), values, torch.zeros_like(values))
