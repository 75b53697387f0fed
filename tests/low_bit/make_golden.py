"""Make golden.npz: what ipex-llm's native quantizer writes for random and adversarial weights.

    .venv-ipex-llm/bin/python -m tests.low_bit.make_golden

Run it in the environment of requirements/ipex-llm.txt. The native library (libllama, part of the
ipex-llm wheel) comes in one build per instruction set: those for AVX2 and up fuse multiply and
add and agree with each other, the one for AVX does not. Both are kept where they differ. The
dequantizers that the library has are checked here against native_layout.py.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

from .native_layout import NATIVE_FORMATS, read_blocks

GOLDEN = Path(__file__).parent / "golden.npz"
NF4_BOUNDARIES = (-0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117,
                  -0.0455250, 0.0397901, 0.1202552, 0.2035212, 0.2920137, 0.3893125, 0.5016634,
                  0.6427869, 0.8614784)  # fmt: skip
NF3_BOUNDARIES = (-0.7393146, -0.3478855, -0.1085709, 0.0804651, 0.2494227, 0.4502661, 0.7813085)


def make_weights() -> np.ndarray:
    """Blocks float32 `[n, 64]`: every row is one case."""
    rng = np.random.default_rng(20261121)
    rows = [rng.standard_normal(64) * scale for scale in (1, 0.02, 1e-4, 1e-6, 1e-8, 1e-30, 50)]
    rows += [rng.standard_cauchy(64) * 0.1, rng.uniform(-1, 1, 64), abs(rng.standard_normal(64))]
    rows += [-abs(rng.standard_normal(64)), rng.standard_normal(64) * 1e-42, np.zeros(64)]
    rows += [np.full(64, value) for value in (1.0, -1.0, 0.3, 1e-39, 400.0)]
    for position, value in ((0, 100.0), (31, -100.0), (32, 1.0), (63, -1e-3)):
        rows.append(np.zeros(64))
        rows[-1][position] = value
    small = rng.standard_normal(64) * 1e-3
    rows += [np.where(np.arange(64) == position, 10.0, small) for position in (5, 40)]
    # The largest magnitude with both signs: the first one decides.
    both = rng.uniform(-0.9, 0.9, (2, 64))
    both[0, [7, 50]], both[1, [7, 50]] = (1, -1), (-1, 1)
    rows += [*both, np.where(np.arange(64) % 2, -1.0, 1.0), np.linspace(-1, 1, 64)]
    # Halfway between codes: of 4 and 5 bits (sixteenths and thirds of them), of 8 bits (halves).
    rows += [*(rng.integers(-16, 17, (2, 64)) / 16), *(rng.integers(-16, 17, (2, 64)) * 3 / 16)]
    rows.append(np.append(rng.integers(-253, 254, 63) / 2, 127.0))
    # bfloat16 weights have 8 bits of mantissa, so halves are common among them.
    as_bits = (rng.standard_normal((6, 64)) * 0.02).astype(np.float32).view(np.uint32)
    rows += list((as_bits & 0xFFFF0000).view(np.float32))
    # Both neighbours of each boundary of nf4 and nf3.
    edges = np.array(NF4_BOUNDARIES + NF3_BOUNDARIES, np.float32)
    near = np.concatenate([np.nextafter(edges, np.float32(way)) for way in (-2, 2)])
    rows.append(np.append(np.append(near, edges[:19]), 1.0))
    return np.array(rows, np.float32)


class NativeLibrary:
    """One build of ipex-llm's libllama, called through ctypes."""

    def __init__(self, build: str) -> None:
        spec = importlib.util.find_spec("ipex_llm")
        self.lib = ctypes.CDLL(str(Path(spec.origin).parent / "libs" / f"libllama_{build}.so"))
        # Without it the table behind float16 is empty and everything dequantizes to 0.
        self.lib.llama_init_backend()

    def quantize(self, weights: np.ndarray, name: str) -> np.ndarray:
        """The native bytes, uint8 `[n, bytes per block]`, without ipex-llm's scale search."""
        number, block_bytes = NATIVE_FORMATS[name]
        assert self.lib.ggml_qk_size(number) == 64
        data = np.zeros((len(weights), block_bytes), np.uint8)
        histogram = (ctypes.c_int64 * 16)()
        self.lib.ggml_quantize_tensor(
            weights.ctypes.data_as(ctypes.c_void_p),
            data.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int(number),
            ctypes.c_size_t(weights.size),
            ctypes.c_int(weights.shape[1]),
            histogram,
            ctypes.c_bool(False),
        )
        return data

    def dequantize(self, data: np.ndarray, name: str) -> np.ndarray:
        """The native library's own float32 values, `[n, 64]`."""
        values = np.full((len(data), 64), np.nan, np.float32)
        self.lib.ggml_dequantize(
            data.ctypes.data_as(ctypes.c_void_p),
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int(values.size),
            ctypes.c_int(NATIVE_FORMATS[name][0]),
        )
        return values


def check_layout(library: NativeLibrary, native: dict[str, np.ndarray]) -> None:
    """Compare native_layout.py with the dequantizers the library has: five formats of twelve."""
    levels = library.dequantize(_every_nibble(), "nf4")[0, :16]
    minifloat = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for name in ("sym_int4", "sym_int8", "nf4", "fp4"):
        codes, scales, _ = read_blocks(native[name], name)
        numbers = {
            "sym_int4": codes.astype(np.float32) - 8,
            "sym_int8": codes.view(np.int8).astype(np.float32),
            "nf4": levels[codes & 15],
            "fp4": minifloat[codes & 7] * np.where(codes & 8, -1, 1),
        }
        expected = (numbers[name] * scales).astype(np.float32)
        assert np.array_equal(library.dequantize(native[name], name), expected), name
    # For fp8_e4m3 its own dequantizer forgets the exponent bias: 256 times the weight.
    codes, scales, _ = read_blocks(native["fp8_e4m3"], "fp8_e4m3")
    wide = codes.astype(np.uint16)
    expected = ((wide & 127) << 7 | (wide & 128) << 8).view(np.float16).astype(np.float32) * scales
    usable = np.isfinite(expected).all(1) & (abs(expected).max(1) > 1e-30)
    values = library.dequantize(native["fp8_e4m3"], "fp8_e4m3")
    assert np.array_equal(values[usable], expected[usable] * 256), "fp8_e4m3"


def _every_nibble() -> np.ndarray:
    """One nf4 block with scale 1 whose first sixteen codes are 0 to 15."""
    block = np.zeros((1, 34), np.uint8)
    block[0, 1] = 0x3C
    block[0, 2:18] = np.arange(16) << 4
    return block


def main() -> None:
    """Write the golden file and say what is in it."""
    weights = make_weights()
    fused, plain = NativeLibrary("avx512"), NativeLibrary("avx")
    arrays = {name: fused.quantize(weights, name) for name in NATIVE_FORMATS}
    check_layout(fused, arrays)
    for name in NATIVE_FORMATS:
        unfused = plain.quantize(weights, name)
        if not np.array_equal(unfused, arrays[name]):
            arrays[f"{name}.unfused"] = unfused
    version = importlib.metadata.version("ipex-llm")
    np.savez_compressed(
        GOLDEN, weights=weights, source=f"libllama_avx512 and _avx of ipex-llm {version}", **arrays
    )
    print(f"{GOLDEN}: {len(weights)} blocks, {GOLDEN.stat().st_size} bytes, {sorted(arrays)}")


if __name__ == "__main__":
    main()
