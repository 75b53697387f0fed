"""Conversion there and back: errors, slices, padding, bad weights, dtypes, tiles, devices."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_serving.low_bit.formats import FORMATS, Format, LowBitError
from autotp_serving.low_bit.numerics import decode
from autotp_serving.low_bit.packing import pack, unpack
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize, quantize

# Root mean square error relative to normally distributed weights.
RELATIVE_ERROR = {
    "sym_int4": 0.095, "asym_int4": 0.090, "sym_int5": 0.047, "asym_int5": 0.043,
    "sym_int8": 0.0059, "nf4": 0.092, "nf3": 0.20, "fp4": 0.106, "fp6": 0.050,
    "fp8_e4m3": 0.025, "fp8_e5m2": 0.053,
}  # fmt: skip
ACCELERATORS = [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


def make_weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def assert_same(one: LowBitTensor, other: LowBitTensor) -> None:
    assert (one.format, one.shape) == (other.format, other.shape)
    for name, plane in one.planes.items():
        assert torch.equal(plane, other.planes[name]), name


@every_format
def test_round_trip_error(format: Format) -> None:
    weight = make_weight(256, 512)
    error = dequantize(quantize(weight, format)) - weight
    assert error.norm() / weight.norm() == pytest.approx(RELATIVE_ERROR[format.name], rel=0.03)


@every_format
def test_error_is_bounded_by_the_step(format: Format) -> None:
    """No weight is further off than half a step, a whole one where the range is lopsided."""
    weight = make_weight(64, 64).exp()
    values = dequantize(quantize(weight, format))
    largest = weight.abs().amax(1, keepdim=True)
    if format.kind == "minifloat":
        # Half of the last kept bit, or of the smallest level.
        smallest = largest * format.level_unit * 2.0 ** (-14 - format.mantissa_bits)
        half_step = weight.abs() * 2.0 ** -(1 + format.mantissa_bits)
        half_step = half_step.maximum(smallest / format.largest_level / 2)
    elif format.kind == "table":
        levels = torch.tensor(format.levels)
        half_step = largest * levels.diff().max() / 2
    else:
        half_step = largest * 2.0**-format.code_bits
        if format.kind == "symmetric":
            half_step *= 2
    assert ((values - weight).abs() <= half_step + 2e-3 * largest).all()


@every_format
def test_codes_are_the_nearest(format: Format) -> None:
    """Brute force over all codes, but for the ends of the symmetric integers."""
    weight = make_weight(32, 64)
    tensor = quantize(weight, format)
    scales, mins = tensor.planes.get("scales"), tensor.planes.get("mins")
    every_code = torch.arange(2**format.code_bits, dtype=torch.uint8).repeat(32, 1)
    values = decode(every_code, scales, mins, format).unsqueeze(1)
    values[values.isnan()] = torch.inf
    nearest = (values - weight.unsqueeze(2)).abs().amin(2)
    error = (dequantize(tensor) - weight).abs()
    # The stored scale is rounded to float16, the codes were chosen before.
    assert (error <= nearest + 1e-3 * weight.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_rounds_as_torch_does(name: str) -> None:
    weight = torch.cat([make_weight(64, 64), make_weight(64, 64) * 1e-4])
    weight[:, 0] = 448 / 256
    expected = {
        "fp8_e4m3": (weight * 256).to(torch.float8_e4m3fn).float() / 256,
        "fp8_e5m2": weight.to(torch.float8_e5m2).float(),
    }
    assert torch.equal(dequantize(quantize(weight, FORMATS[name])), expected[name])


@pytest.mark.parametrize("code_bits", [3, 4, 5, 6, 8])
def test_pack_and_unpack(code_bits: int) -> None:
    codes = torch.randint(0, 2**code_bits, (10, 64), dtype=torch.uint8)
    planes = pack(codes, code_bits)
    assert sum(plane.shape[1] for plane in planes.values()) == code_bits * 8
    assert torch.equal(unpack(planes, code_bits), codes)


def test_order_of_codes_in_bytes() -> None:
    """Kernels rely on it: nibbles 32 apart, pairs of bits 16 apart, single bits in order."""
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 33] = 0b111111
    six, five = pack(codes, 6), pack(codes & 31, 5)
    assert six["codes"].nonzero().tolist() == [[0, 1]] and six["codes"][0, 1] == 0xF0
    assert six["high"].nonzero().tolist() == [[0, 1]] and six["high"][0, 1] == 0b11 << 4
    assert five["high"].nonzero().tolist() == [[0, 4]] and five["high"][0, 4] == 0b10


@every_format
def test_a_slice_is_the_quantized_slice(format: Format) -> None:
    weight = make_weight(12, 320)
    whole = quantize(weight, format)
    assert_same(whole.slice_rows(3, 7), quantize(weight[3:7], format))
    columns = quantize(weight[:, 64:192], format)
    assert torch.equal(dequantize(columns), dequantize(whole)[:, 64:192])


@every_format
@pytest.mark.parametrize("cols", [1, 63, 100])
def test_padding_leaves_no_trace(format: Format, cols: int) -> None:
    """The last block has the range of its own weights, also where zero is not among them."""
    weight = make_weight(8, cols) + 1
    tensor = quantize(weight, format)
    assert tensor.shape == (8, cols)
    assert tensor.num_bytes == sum(plane.nbytes for plane in tensor.planes.values())
    filled = torch.cat([weight, weight[:, -1:].expand(-1, -cols % 64)], 1)
    assert torch.equal(dequantize(tensor), dequantize(quantize(filled, format))[:, :cols])


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(format: Format, bad: float) -> None:
    weight = make_weight(300, 128)
    weight[299, 100] = bad
    with pytest.raises(LowBitError, match="the weight holds NaN or infinity"):
        quantize(weight, format, tile=2**10)


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [("sym_int4", 524032, 5.3e5), ("asym_int4", 65504, 6.6e4), ("nf4", 65504, 6.6e4),
     ("fp4", 393024, 4e5), ("fp6", 447, 448), ("fp8_e5m2", 57344, 57345)],
)  # fmt: skip
def test_too_large_for_the_scale(name: str, fits: float, too_large: float) -> None:
    weight = torch.zeros(1, 64)
    weight[0, 3] = fits
    assert dequantize(quantize(weight, FORMATS[name]))[0, 3] == pytest.approx(fits, rel=1e-3)
    weight[0, 3] = too_large
    with pytest.raises(LowBitError, match=f"too large for {name}: at most"):
        quantize(weight, FORMATS[name])


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_gives_the_bytes_of_float32(format: Format, dtype: torch.dtype) -> None:
    weight = make_weight(4, 128).to(dtype)
    assert_same(quantize(weight, format), quantize(weight.float(), format))


@every_format
@pytest.mark.parametrize("tile", [64, 1000, 2**14])
def test_tile_size_changes_nothing(format: Format, tile: int) -> None:
    weight = make_weight(33, 192)
    tensor = quantize(weight, format)
    assert_same(quantize(weight, format, tile=tile), tensor)
    assert torch.equal(dequantize(tensor, tile=tile), dequantize(tensor))


SMALL_FLOATS = pytest.mark.parametrize("name", ["fp4", "fp6", "fp8_e4m3"])


def make_halves(ratio: int, exponent: int) -> torch.Tensor:
    """Numbers of e2m1 times a power of two, smaller by 2**ratio in the other half of a block."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    row = torch.cat([levels, -levels]).repeat(4) * 2.0**exponent
    row[32:] *= 2.0**-ratio
    return row.repeat(3, 2)


@pytest.mark.parametrize("exponent", [-9, 0, 3])
@pytest.mark.parametrize(("name", "reach"), [("fp4", 0), ("fp6", 5), ("fp8_e4m3", 14)])
def test_power_of_two_scales_keep_e2m1(name: str, reach: int, exponent: int) -> None:
    for ratio in range(reach + 1):
        weight = make_halves(ratio, exponent)
        tensor = quantize(weight, FORMATS[name], power_of_two_scales=True)
        assert torch.equal(dequantize(tensor), weight)
    further = make_halves(reach + 1, exponent)
    found = dequantize(quantize(further, FORMATS[name], power_of_two_scales=True))
    assert 0 < (found - further).abs().max() <= 2.0 ** (exponent - reach - 2)


@SMALL_FLOATS
@pytest.mark.parametrize("peak", [1e-12, 3e4, 4e4, 6e4])
def test_power_of_two_scales_beyond_their_type(name: str, peak: float) -> None:
    """Tiny numbers may become zeros; at the top, scales are what they are without the wish."""
    format = FORMATS[name]
    unit = 1.0 if format.scale_dtype == "float32" else format.largest_level
    weight = make_weight(2, 64).clamp(-0.02, 0.02) / 0.02 * peak * unit
    found = dequantize(quantize(weight, format, power_of_two_scales=True))
    assert (found - weight).abs().max() <= (0.26 if peak > 1 else 1.0) * peak * unit


@SMALL_FLOATS
def test_power_of_two_scales_refuse_what_is_no_number(name: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = make_weight(2, 64)
        weight[1, 3] = bad
        with pytest.raises(LowBitError, match="NaN or infinity"):
            quantize(weight, FORMATS[name], power_of_two_scales=True)
    assert not dequantize(
        quantize(torch.zeros(2, 64), FORMATS[name], power_of_two_scales=True)
    ).any()


@every_format
def test_zeros_stay_zero(format: Format) -> None:
    assert not dequantize(quantize(torch.zeros(2, 64), format)).any()


@every_format
def test_safetensors_and_back(format: Format, tmp_path) -> None:
    tensor = quantize(make_weight(4, 100), format)
    save_file(tensor.to_dict("layer.weight"), tmp_path / "low_bit.safetensors")
    tensors = load_file(tmp_path / "low_bit.safetensors")
    planes = {name.removeprefix("layer.weight."): plane for name, plane in tensors.items()}
    assert_same(LowBitTensor(format, (4, 100), planes), tensor)


def test_foreign_planes_are_named() -> None:
    sym_int4, asym_int4 = FORMATS["sym_int4"], FORMATS["asym_int4"]
    planes = quantize(make_weight(4, 128), sym_int4).planes
    with pytest.raises(LowBitError, match="asym_int4 has planes codes, scales, mins, not codes"):
        LowBitTensor(asym_int4, (4, 128), planes)
    with pytest.raises(LowBitError, match=r"plane codes .* must be uint8 5 x 64, not"):
        LowBitTensor(sym_int4, (5, 128), planes)
    with pytest.raises(LowBitError, match=r"plane scales .* must be float16 4 x 2, not"):
        LowBitTensor(sym_int4, (4, 128), planes | {"scales": planes["scales"].float()})


@pytest.mark.skipif(not ACCELERATORS, reason="no accelerator here")
@pytest.mark.parametrize("device", ACCELERATORS)
@every_format
def test_same_bytes_on_every_device(format: Format, device: str) -> None:
    ties = torch.randint(-16, 17, (500, 192)) * 3 / 16
    weight = torch.cat([make_weight(500, 192).bfloat16().float(), ties, torch.zeros(1, 192)])
    tensor = quantize(weight, format)
    assert_same(quantize(weight.to(device), format).to("cpu"), tensor)
    assert torch.equal(dequantize(tensor.to(device)).cpu(), dequantize(tensor))
