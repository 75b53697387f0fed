"""The low-bit linear layer beside a float32 one."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from autotp_serving.layers import low_bit_linear
from autotp_serving.layers.low_bit_linear import LowBitLinear, portable_matmul
from autotp_serving.low_bit.formats import FORMATS, Format
from autotp_serving.low_bit.tensor import dequantize, quantize

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that round activations have their own tests, with bounds."""
    monkeypatch.setattr(low_bit_linear, "load_library", lambda format: None)


@every_format
@pytest.mark.parametrize("cols", [192, 100])
def test_equals_the_dequantized_layer(format: Format, cols: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, cols), torch.randn(48)
    tensor = quantize(weight, format)
    reference = nn.Linear(cols, 48)
    reference.load_state_dict({"weight": dequantize(tensor), "bias": bias})
    x = torch.randn(2, 5, cols)
    out = LowBitLinear(tensor, bias)(x)
    assert out.shape == (2, 5, 48)
    torch.testing.assert_close(out, reference(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = quantize(torch.randn(32, 256), FORMATS["sym_int8"])
    x = torch.randn(3, 256).to(dtype)
    out = LowBitLinear(tensor)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), x.float() @ dequantize(tensor).T, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("tile", [1, 300, 4096, 2**30])
def test_any_tiling_gives_the_same(tile: int) -> None:
    torch.manual_seed(0)
    tensor = quantize(torch.randn(50, 300), FORMATS["nf4"])
    x = torch.randn(7, 300)
    whole = x @ dequantize(tensor).T
    # Torch sums in an order that its threads and the sizes decide.
    tiled = portable_matmul(x, tensor, tile=tile)
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=1e-4)


def test_row_parallel_halves_add_up() -> None:
    """Two ranks' column slices, summed by `reduce`, then the bias once."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(16, 192), torch.ones(16), torch.randn(192)
    whole, left, right = (
        quantize(part, FORMATS["fp6"]) for part in (weight, weight[:, :128], weight[:, 128:])
    )
    second = LowBitLinear(right)
    first = LowBitLinear(left, bias, reduce=lambda out: out + second(x[128:]))
    torch.testing.assert_close(first(x[:128]), LowBitLinear(whole, bias)(x))


def test_no_tokens() -> None:
    assert LowBitLinear(quantize(torch.randn(8, 64), FORMATS["nf3"]))(torch.zeros(0, 64)).shape == (
        0,
        8,
    )


@every_format
def test_casting_the_model_leaves_the_planes_alone(format: Format) -> None:
    """`model.half()` must not round float32 scales, nor `.to(bfloat16)` those of float16."""
    layer = LowBitLinear(quantize(torch.randn(8, 64), format), torch.zeros(8))
    before = {name: plane.clone() for name, plane in layer.weight.planes.items()}
    model = nn.Sequential(layer).half().to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for name, plane in model[0].weight.planes.items():
        assert plane.dtype == before[name].dtype and torch.equal(plane, before[name])
        assert plane is getattr(layer, name)


def test_state_dict_holds_the_planes() -> None:
    layer = LowBitLinear(quantize(torch.randn(8, 64), FORMATS["asym_int5"]), torch.zeros(8))
    assert sorted(layer.state_dict()) == ["bias", "codes", "high", "mins", "scales"]


MEASURE = """
import resource, torch
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.tensor import quantize
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = LowBitLinear(quantize(torch.ones(1024, 512), FORMATS["nf4"]))
small(torch.ones(4, 512, dtype=torch.bfloat16))
weight = torch.ones(8192, 8192, dtype=torch.bfloat16)
start = peak()
layer = LowBitLinear(quantize(weight, FORMATS["nf4"]))
converted = peak()
layer(torch.ones(4, 8192, dtype=torch.bfloat16))
print(start, converted, peak())
"""


def test_memory_stays_near_the_planes() -> None:
    """Converting 64 M weights (34 MiB in nf4, 256 in float32) needs them twice for a moment, in the
    formats' order and in the kernels'; multiplying needs little more.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, converted, multiplied = map(float, done.stdout.split())
    assert converted - start < 2 * 34 + 24
    assert multiplied - converted < 24
