"""Our codes beside those of ipex-llm's native library, kept in golden.npz by make_golden.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from autotp_serving.low_bit.formats import FORMATS, find_format
from autotp_serving.low_bit.numerics import decode
from autotp_serving.low_bit.packing import unpack
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize, quantize

from .native_layout import NATIVE_FORMATS, NativeBlocks, read_blocks

SMALLEST_NORMAL = 2.0**-126
EXACT = ("sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "nf4", "nf3", "woq_int4")
CUT = ("fp4", "fp6", "fp8_e4m3", "fp8_e5m2")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(golden["weights"])


def native_values(blocks: NativeBlocks, name: str) -> torch.Tensor:
    parts = [None if part is None else torch.from_numpy(part) for part in blocks]
    return decode(*parts, find_format(name))


def codes_of(tensor: LowBitTensor) -> torch.Tensor:
    return unpack(tensor.planes, tensor.format.code_bits)


def is_normal(weights: torch.Tensor) -> torch.Tensor:
    """Rows above float32's denormals, where 1 / scale overflows and native codes are arbitrary."""
    return weights.abs().amax(1) > 64 * SMALLEST_NORMAL


@pytest.mark.parametrize("name", EXACT)
def test_codes_scales_and_mins_are_equal(name: str, golden: dict, weights: torch.Tensor) -> None:
    """Bit for bit, beside the native build that, like torch, rounds product and sum apart."""
    native = read_blocks(golden.get(f"{name}.unfused", golden[name]), name)
    ours = quantize(weights, find_format(name))
    assert np.array_equal(ours.planes["scales"].float().numpy(), native.scales)
    if native.mins is not None:
        assert np.array_equal(ours.planes["mins"].float().numpy(), native.mins)
    normal = is_normal(weights)
    assert torch.equal(codes_of(ours)[normal], torch.from_numpy(native.codes)[normal])
    assert torch.equal(dequantize(ours)[normal], native_values(native, name)[normal])


@pytest.mark.parametrize("name", EXACT)
def test_fused_build_differs_at_halves_only(name: str, golden: dict, weights: torch.Tensor) -> None:
    """With a fused multiply-add a weight halfway between two codes may get the other one."""
    native = read_blocks(golden[name], name)
    ours = quantize(weights, find_format(name))
    steps = codes_of(ours).int() - torch.from_numpy(native.codes).int()
    steps[~is_normal(weights)] = 0
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() == (15 if f"{name}.unfused" in golden else 0)
    error = (dequantize(ours) - weights).abs()
    native_error = (native_values(native, name) - weights).abs()
    differs = steps != 0
    assert torch.allclose(error[differs], native_error[differs], rtol=1e-3)


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_denormal_blocks_stay_denormal(name: str, golden: dict, weights: torch.Tensor) -> None:
    """Below 1e-36 ours turns to zero or keeps the weight; the native codes are arbitrary there."""
    tiny = ~is_normal(weights)
    assert tiny.sum() >= 3
    values = dequantize(quantize(weights, find_format(name)))[tiny]
    assert ((values - weights[tiny]).abs() <= weights[tiny].abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", CUT)
def test_minifloats_share_scales_and_are_nearer(
    name: str, golden: dict, weights: torch.Tensor
) -> None:
    """The native library cuts bits off; here the nearest level is taken, at most one code away."""
    format = FORMATS[name]
    native = read_blocks(golden[name], name)
    ours = quantize(weights, format)
    normal = is_normal(weights)
    if native.scales is not None:
        scales = ours.planes["scales"].float().numpy()
        assert np.array_equal(scales[normal], native.scales[normal])
    magnitude = 2 ** (format.code_bits - 1) - 1
    steps = (codes_of(ours) & magnitude).int() - torch.from_numpy(native.codes & magnitude).int()
    steps = steps[normal]
    assert steps.min() >= 0 and steps.max() == 1
    error = (dequantize(ours) - weights).abs()
    native_error = (native_values(native, name) - weights).abs()
    # The float16 scale is rounded after the codes are chosen, coarsely once it is denormal.
    precise = weights.abs().amax(1) > (1e-4 if format.scale_dtype == "float16" else 1e-36)
    assert (error <= native_error + 1e-3 * weights.abs())[precise].all()
    assert error[:2].norm() < (0.95 if name == "fp4" else 0.6) * native_error[:2].norm()
