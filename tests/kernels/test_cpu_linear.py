"""The CPU kernels beside the dequantized product in float64, for each instruction set.

The bound: with activations rounded to 8 bits per block of 64, an activation is off by at most
1/254 of its block's largest (flushed to zero below 2**-119), so a result by at most
    sum over blocks of  peak(x) / 254 * sum |w|  +  sum |x| * table error,
and a little for sums in float32 and the output's own rounding. With bfloat16 activations (fp6,
fp8) it is |x| / 256 instead of peak(x) / 254.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from autotp_serving.devices.build import ISAS, BuildError, build_library, processor_flags
from autotp_serving.kernels.cpu import linear
from autotp_serving.kernels.cpu.linear import CpuMatmul, load_library
from autotp_serving.kernels.cpu.tiles import TiledTensor, tile
from autotp_serving.layers.low_bit_linear import LowBitLinear, make_matmul
from autotp_serving.low_bit.formats import FORMATS, Format, LowBitError, num_blocks
from autotp_serving.low_bit.numerics import largest_weight
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize, quantize
from tests.compiler import can_compile, needs_compiler

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not ISAS[request.param].needs <= processor_flags():
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Some tests change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def find_matmul(format: Format, isa: str) -> Callable[[Tensor, LowBitTensor], Tensor]:
    if not can_compile():
        pytest.skip("no C++ compiler")
    library = load_library(format, isa)
    assert library is not None, "it does not compile: see the log"
    return lambda x, tensor: CpuMatmul(library, tensor)(x)


def has_pairs(format: Format) -> bool:
    """Whether activations become bfloat16."""
    return format.kind == "minifloat" and format.code_bits > 4


def find_bound(x: Tensor, tensor: LowBitTensor) -> Tensor:
    """The largest error that is allowed, for each result, in float64."""
    tokens, cols = x.shape
    blocks = num_blocks(cols)
    pad = (0, blocks * 64 - cols)
    x = torch.nn.functional.pad(x.double().abs(), pad).view(tokens, 1, blocks, 64)
    weight = dequantize(tensor).double().abs()
    weight = torch.nn.functional.pad(weight, pad).view(1, -1, blocks, 64)
    if has_pairs(tensor.format):
        error = (x * weight).sum((2, 3)) / 256
    else:
        peak = x.amax(3)
        error = (peak * weight.sum(3)).sum(2) / 253 + 64 * 2.0**-118 * weight.sum((2, 3))
        if tensor.format.kind == "table":
            # Levels become steps of at least 1/127 of the block's largest weight.
            error += (x.sum(3) * weight.amax(3)).sum(2) / 254
    return error + (x * weight).sum((2, 3)) * 2.0**-18 + 1e-37


def check(
    x: Tensor, tensor: LowBitTensor, matmul: Callable[[Tensor, LowBitTensor], Tensor]
) -> Tensor:
    out = matmul(x, tensor)
    assert out.shape == (x.shape[0], tensor.shape[0]) and out.dtype == x.dtype
    exact = x.double() @ dequantize(tensor).double().T
    rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
    error = (out.double() - exact).abs()
    allowed = find_bound(x, tensor) + exact.abs() * rounding[x.dtype]
    assert bool((error <= allowed).all()), float((error / allowed).max())
    return out


@every_format
@pytest.mark.parametrize(("rows", "cols"), [(48, 192), (1, 64), (17, 100), (70, 1000), (33, 63)])
def test_within_the_bound(format: Format, isa: str, rows: int, cols: int) -> None:
    """Odd numbers of rows, columns that are no multiple of 64, 1 to 70 tokens."""
    torch.manual_seed(rows)
    matmul, tensor = find_matmul(format, isa), quantize(torch.randn(rows, cols), format)
    for tokens in (1, 2, 7, 8, 17, 70):
        x = torch.randn(tokens, cols)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(x.to(dtype), tensor, matmul)


@every_format
def test_many_tokens(format: Format, isa: str) -> None:
    """More than are made ready at once."""
    torch.manual_seed(0)
    tensor = quantize(torch.randn(40, 1024), format)
    check(torch.randn(601, 1024), tensor, find_matmul(format, isa))


def adversarial_inputs(cols: int) -> dict[str, Tensor]:
    normal = torch.randn(5, cols)
    outlier, alternating = normal.clone(), torch.full((5, cols), 3.0)
    outlier[:, 7] = 3e4
    alternating[:, ::2] *= -1
    return {
        "zeros": torch.zeros(5, cols),
        "one outlier": outlier,
        "equal": torch.full((5, cols), -2.5),
        "alternating": alternating,
        "denormal": normal * 2.0**-135,
        "tiny": normal * 2.0**-110,
        "huge": normal * 2.0**100,
        "halves": (torch.randint(-254, 255, (5, cols)) / 2).float(),
        "zeros but one": torch.nn.functional.one_hot(
            torch.tensor([0, 5, 63, 64, 99]), cols
        ).float(),
        "blocks of many sizes": normal * (10.0 ** (torch.arange(cols) // 64 * 4.0 - 12)),
    }


@every_format
def test_adversarial_activations(format: Format, isa: str) -> None:
    torch.manual_seed(0)
    matmul, tensor = find_matmul(format, isa), quantize(torch.randn(48, 448), format)
    for x in adversarial_inputs(448).values():
        check(x, tensor, matmul)


@every_format
def test_adversarial_weights(format: Format, isa: str) -> None:
    torch.manual_seed(0)
    matmul, x = find_matmul(format, isa), torch.randn(9, 448)
    limit = 0.99 * min(largest_weight(format), 1e20)
    for weight in adversarial_inputs(448).values():
        check(x, quantize(weight.clamp(-limit, limit).repeat(4, 1), format), matmul)


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(format: Format, isa: str, value: float) -> None:
    """And only in its own token."""
    torch.manual_seed(0)
    matmul, tensor = find_matmul(format, isa), quantize(torch.randn(32, 128), format)
    x = torch.randn(3, 128)
    x[1, 70] = value
    out = matmul(x, tensor)
    assert not out[1].isfinite().any()
    assert torch.equal(out[::2], matmul(x[::2], tensor))


@every_format
def test_codes_of_every_value(format: Format, isa: str) -> None:
    """Random bytes as codes: each code is multiplied as it is dequantized."""
    torch.manual_seed(0)
    tensor = quantize(torch.randn(16, 1024), format)
    # Exponents of all ones would be infinity or NaN in fp8_e5m2.
    tensor.planes["codes"].random_(0, 256)
    if format.name == "fp8_e5m2":
        tensor.planes["codes"] &= 0xBF
    if "high" in tensor.planes:
        tensor.planes["high"].random_(0, 256)
    check(torch.randn(4, 1024), tensor, find_matmul(format, isa))


@every_format
def test_a_token_is_bitwise_the_same_in_any_company(format: Format, isa: str) -> None:
    """At any number of threads, and whether its tile is decoded for one token or for many."""
    if "amx" in isa and has_pairs(format):
        pytest.skip("AMX sums bfloat16 products in another order")
    torch.manual_seed(0)
    matmul, tensor = find_matmul(format, isa), quantize(torch.randn(200, 320), format)
    x = torch.randn(300, 320).bfloat16()
    torch.set_num_threads(1)
    expected = torch.cat([matmul(token[None], tensor) for token in x])
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        for start, stop in ((0, 300), (5, 6), (0, 2), (13, 29), (200, 255), (290, 300)):
            assert torch.equal(matmul(x[start:stop], tensor), expected[start:stop])


@every_format
def test_instruction_sets_agree(format: Format) -> None:
    """Bitwise with 8-bit activations; bfloat16 products are summed in another order."""
    torch.manual_seed(0)
    tensor, x = quantize(torch.randn(50, 300), format), torch.randn(20, 300)
    isas = [name for name, isa in ISAS.items() if isa.needs <= processor_flags()]
    first, *others = (find_matmul(format, isa)(x, tensor) for isa in isas)
    for other in others:
        if has_pairs(format):
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(first, other)


def test_activations_as_they_lie(isa: str) -> None:
    """Rows apart, columns apart, none at all."""
    torch.manual_seed(0)
    format = FORMATS["sym_int4"]
    matmul, tensor = find_matmul(format, isa), quantize(torch.randn(32, 128), format)
    wide = torch.randn(6, 500)
    for x in (wide[:, 100:228], wide[::2, :128], wide[:, ::3][:, :128], wide.T[:128, :4].T):
        assert torch.equal(matmul(x, tensor), matmul(x.clone().contiguous(), tensor))
    assert matmul(torch.zeros(0, 128), tensor).shape == (0, 32)


@every_format
@pytest.mark.parametrize(("rows", "cols"), [(48, 192), (5, 64), (70, 100)])
def test_tiles_are_the_same_bytes(format: Format, rows: int, cols: int) -> None:
    torch.manual_seed(0)
    tensor = quantize(torch.randn(rows, cols), format)
    tiled = tile(tensor)
    assert tiled.num_bytes == tensor.num_bytes
    back = tiled.canonical()
    for name, plane in tensor.planes.items():
        assert tiled.planes[name].shape == plane.shape
        assert torch.equal(back.planes[name], plane)
    assert torch.equal(dequantize(tiled), dequantize(tensor))
    assert torch.equal(dequantize(tiled.slice_rows(1, 4)), dequantize(tensor)[1:4])


def test_layer_keeps_one_copy_and_saves_the_formats_order() -> None:
    torch.manual_seed(0)
    tensor = quantize(torch.randn(40, 128), FORMATS["asym_int4"])
    if not can_compile():
        pytest.skip("no C++ compiler")
    layer = LowBitLinear(tensor)
    assert isinstance(layer.weight, TiledTensor)
    for name, plane in layer.weight.planes.items():
        assert getattr(layer, name) is plane
    for name, plane in layer.to(torch.bfloat16).state_dict().items():
        assert torch.equal(plane, tensor.planes[name])
    x = torch.randn(2, 3, 128)
    assert layer(x).shape == (2, 3, 40)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("name", ["sym_int4", "asym_int5", "nf4", "fp8_e4m3"])
def test_several_weights_together_are_each_alone(
    name: str, num_tokens: int, num_threads: int
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(num_threads)
    tensors = [quantize(torch.randn(rows, 192), FORMATS[name]) for rows in (48, 7, 16, 33)]
    x = torch.randn(num_tokens, 192).bfloat16()
    together = make_matmul(*tensors)(x)
    assert torch.equal(together, torch.cat([make_matmul(tensor)(x) for tensor in tensors], 1))


def test_weights_that_differ_are_not_multiplied_together() -> None:
    library = load_library(FORMATS["sym_int4"])
    if library is None:
        pytest.skip("no C++ compiler")
    narrow, wide = (quantize(torch.randn(16, n), FORMATS["sym_int4"]) for n in (64, 128))
    with pytest.raises(LowBitError, match="alike"):
        CpuMatmul(library, narrow, wide)


def test_no_compiler_means_portable_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise BuildError("no C++ compiler (g++)")

    monkeypatch.setattr(linear, "build_library", fail)
    load_library.cache_clear()
    try:
        torch.manual_seed(0)
        tensor, x = quantize(torch.randn(8, 64), FORMATS["sym_int4"]), torch.randn(1, 64)
        layers = [LowBitLinear(tensor), LowBitLinear(tensor)]
        torch.testing.assert_close(layers[0](x), x @ dequantize(tensor).T)
    finally:
        load_library.cache_clear()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "portable torch" in lines[0] and "no C++ compiler" in lines[0]


ONE_OPENMP = """
import torch
from pathlib import Path
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.kernels.cpu.linear import load_library
load_library(FORMATS["sym_int4"])
maps = Path("/proc/self/maps").read_text().splitlines()
names = {line.split()[-1] for line in maps if "omp" in line.split()[-1].rsplit("/", 1)[-1]}
print(sum(name.rsplit("/", 1)[-1].startswith(("libgomp", "libiomp", "libomp")) for name in names))
"""


def test_threads_are_those_of_torch() -> None:
    """A second OpenMP library would have a second pool of threads on the same cores."""
    done = subprocess.run([sys.executable, "-c", ONE_OPENMP], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


SLOW_COMPILER = """#!/bin/sh
test -e {folder}/again || {{ touch {folder}/started; exec sleep 60; }}
exec g++ "$@"
"""


@needs_compiler
def test_a_killed_build_does_not_stop_the_next(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its lock nor half a library stays behind; torch's stale lock file goes too."""
    compiler, source = tmp_path / "compiler", tmp_path / "code" / "one.cpp"
    compiler.write_text(SLOW_COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    source.parent.mkdir()
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = (
        "import sys; from pathlib import Path; from autotp_serving.devices.build import *;"
        "build_library('one', Path(sys.argv[1]), ())"
    )
    build = subprocess.Popen([sys.executable, "-c", program, str(source)], start_new_session=True)
    while not (tmp_path / "started").exists():
        assert build.poll() is None
    build.kill()
    build.wait()
    (tmp_path / "again").touch()
    library = ctypes.CDLL(str(build_library("one", source, ())))
    assert library.one() == 1


def test_compiler_errors_are_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "bad.cpp"
    source.write_text("nonsense\n")
    with pytest.raises(BuildError) as raised:
        build_library("bad", source, ())
    assert len(str(raised.value).splitlines()) == 1
