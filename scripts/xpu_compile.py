"""Compile every Triton kernel for Intel cards that need not be here, and count what they became.

    python scripts/xpu_compile.py [--cards acm-g10,pvc] [--markdown FILE]

For an environment with Intel's Triton (`run_tests.sh --xpu-compile` makes one) and `ocloc`.
The package's own functions launch the kernels, on tensors of the CPU, with the tiles and options
that they would choose on the card; Triton's launch is replaced by compiling. Exit code 1 when a
decode, merge or store kernel keeps registers in scratch memory, when a kernel asks for fp64, or
when one for a card that has none got some.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from autotp_serving.kernels.kv_pools import Pools  # noqa: E402
from autotp_serving.kernels.triton import attention, cards, store  # noqa: E402

COMMON = {
    "platform_name": "",
    "vendor": "Intel",
    "max_work_group_size": 1024,
    "has_fp64": False,
    "has_bfloat16_conversions": True,
}
DEVICES = {
    "acm-g10": {
        **COMMON,
        "name": "Intel(R) Arc(TM) A770 Graphics",
        "version": "12.55.8",
        "architecture": 0x030DC00800,
        "gpu_eu_count": 512,
        "gpu_subslice_count": 32,
        "max_num_sub_groups": 128,
        "sub_group_sizes": [8, 16, 32],
        "has_subgroup_matrix_multiply_accumulate": False,
        "has_subgroup_2d_block_io": False,
    },
    "pvc": {
        **COMMON,
        "name": "Intel(R) Data Center GPU Max 1100",
        "version": "12.60.7",
        "architecture": 0x030F000700,
        "gpu_eu_count": 448,
        "gpu_subslice_count": 56,
        "max_num_sub_groups": 64,
        "sub_group_sizes": [16, 32],
        "has_subgroup_matrix_multiply_accumulate": True,
        "has_subgroup_2d_block_io": True,
    },
}
TABLE = {"acm-g10": cards.ARC, "pvc": cards.XE}
WITHOUT_FP64 = ("acm-g10",)
MAY_SPILL = ("prefill_kernel",)
"""Kernels that may; their figures are printed all the same."""
SHAPES = ((32, 32, 128), (32, 8, 128), (32, 32, 80), (32, 32, 96), (8, 1, 256), (64, 8, 64))
"""Heads, kv heads, head size: Llama-2, Llama-3, Phi-2, Phi-3, Gemma, gpt-oss."""


@dataclass(frozen=True)
class Row:
    """One kernel on one card.

    Attributes:
        spill_bytes: what the compiler calls spilled.
        scratch: messages to scratch memory, whatever it calls them.
        sends: all messages to memory and other units.
        matrix: `dpas`, instructions of the matrix unit.
        fp64: instructions on numbers of 64 bits. Intel's compiler has its own for a division that
            is rightly rounded, on cards that can.
        declares_fp64: whether the SPIR-V they were made from does.
    """

    card: str
    kernel: str
    shape: str
    spill_bytes: int
    scratch: int
    sends: int
    matrix: int
    fp64: int
    declares_fp64: bool

    @property
    def mistake(self) -> str | None:
        """What is wrong with it, if something is."""
        if self.declares_fp64 or (self.fp64 and self.card in WITHOUT_FP64):
            return "uses fp64"
        if self.kernel not in MAY_SPILL and (self.spill_bytes or self.scratch):
            return f"keeps registers in scratch memory ({self.scratch} messages)"
        return None


def collect_launches(card: str) -> list[tuple[str, object]]:
    """Let Triton compile for a card instead of launching; the list fills with (name, compiled)."""
    target = GPUTarget("xpu", DEVICES[card], 32)
    number = list(DEVICES).index(card)  # Triton keeps a target and its kernels by this
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: number,
            get_current_stream=lambda device: 0,
        )
    )
    done: list[tuple[str, object]] = []

    def compile_launch(kernel: JITFunction, grid: tuple[int, ...]) -> object:
        def run(*args: object, **options: object) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            done.append((kernel.fn.__name__, compiled))

        return run

    JITFunction.__getitem__ = compile_launch
    # Tensors are on the CPU, and the card is known here alone.
    cards.find_card = attention.find_card = lambda device: TABLE[card]
    store.choose_store_options = lambda device: dict(cards.make_intel_options())
    return done


def launch_all(
    shape: tuple[int, int, int], is_int8: bool, has_options: bool, dtype: torch.dtype
) -> None:
    """Store, decode and a mixed prefill of a layer; with a window, soft cap and sinks if asked."""
    num_heads, num_kv_heads, head_dim = shape
    size = (256, num_kv_heads, head_dim)
    pools = Pools(*(torch.zeros(size, dtype=torch.int8 if is_int8 else dtype) for _ in range(2)))
    if is_int8:
        pools = Pools(pools.keys, pools.values, *(torch.zeros(size[:2]) for _ in range(2)))
    inputs = SimpleNamespace(
        rows=torch.zeros(2, dtype=torch.int32),
        query_starts=torch.zeros(3, dtype=torch.int32),
        context_lens=torch.zeros(2, dtype=torch.int32),
        block_tables=torch.zeros((3, 256), dtype=torch.int32),
        num_seqs=2,
        num_tokens=64,
        max_query_len=32,
        is_decode=False,
    )
    query = torch.zeros((64, num_heads, head_dim), dtype=dtype)
    key, value = torch.zeros((2, 64, num_kv_heads, head_dim), dtype=dtype)
    workspace = attention.allocate_workspace(
        2, num_heads, num_kv_heads, head_dim, 16, is_int8, torch.device("cpu")
    )
    options = (1024, 30.0, torch.zeros(num_heads, dtype=dtype)) if has_options else (None,) * 3
    attention.store(key, value, torch.zeros(64, dtype=torch.int64), pools)
    out = torch.zeros_like(query)
    attention.decode(query, pools, inputs, 0.1, *options, out, workspace)
    attention.prefill(query, pools, inputs, 0.1, *options, out, workspace)


def build(card: str, name: str, compiled: object, shape: str) -> Row:
    """Make a card's own instructions of a kernel with Intel's compiler, and count them.

    Raises:
        SystemExit: it does not compile.
    """
    spirv = compiled.asm["spv"]
    flags = getattr(compiled.metadata, "build_flags", "")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.spv").write_bytes(spirv)
        command = ["ocloc", "compile", "-file", "kernel.spv", "-spirv_input", "-device", card]
        command += ["-output", "kernel", *(["-options", flags] if flags else [])]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        said = done.stdout + done.stderr
        binaries = list(Path(folder).glob("kernel*.bin"))
        if not binaries:
            sys.exit(f"{card}: {name} ({shape}) does not compile:\n{said[-2000:]}")
        command = ["ocloc", "disasm", "-file", binaries[0].name, "-dump", "dump", "-device", card]
        subprocess.run(command, cwd=folder, capture_output=True, env=disassembler(folder))
        text = "".join(path.read_text() for path in Path(folder, "dump").glob("*.asm"))
    if not text:
        sys.exit(f"ocloc disassembled nothing of {name}: is libiga64.so.1 installed (libigc1)?")
    spilled = re.search(r"spilled around (\d+)", said)
    return Row(
        card,
        name,
        shape,
        int(spilled.group(1)) if spilled else 0,
        len(re.findall(r"^.*\bsend.*scratch", text, re.MULTILINE)),
        len(re.findall(r"^\s*(?:\(.*?\)\s*)?send", text, re.MULTILINE)),
        len(re.findall(r"^\s*(?:\(.*?\)\s*)?dpas", text, re.MULTILINE)),
        len(re.findall(r"^.*:df\b", text, re.MULTILINE)),
        has_fp64_type(spirv),
    )


def disassembler(folder: str) -> dict[str, str]:
    """An environment in which ocloc finds its disassembler, by a name that Debian does not make."""
    for library in Path("/usr/lib/x86_64-linux-gnu").glob("libiga64.so.1"):
        Path(folder, "libiga64.so").symlink_to(library)
    return {**os.environ, "LD_LIBRARY_PATH": folder}


def has_fp64_type(spirv: bytes) -> bool:
    """Whether a SPIR-V module declares a float of 64 bits (OpTypeFloat, opcode 22)."""
    words = memoryview(spirv).cast("I")
    place = 5  # after the header
    while place < len(words):
        count, opcode = words[place] >> 16, words[place] & 0xFFFF
        if opcode == 22 and words[place + 2] == 64:
            return True
        place += max(1, count)
    return False


def compile_all(card: str) -> Iterator[Row]:
    """Every kernel of the package, in every form that is asked for."""
    done = collect_launches(card)
    seen = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = []
        for form in list_forms():
            launch_all(*form)
            for name, compiled in done:
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    rows.append(pool.submit(build, card, name, compiled, describe(*form)))
            done.clear()
        for row in rows:
            yield row.result()


def list_forms() -> Iterator[tuple[tuple[int, int, int], bool, bool, torch.dtype]]:
    """What `launch_all` takes: shapes, caches, options, types."""
    for shape in SHAPES:
        for is_int8 in (False, True):
            yield shape, is_int8, False, torch.float16
    for is_int8 in (False, True):
        yield SHAPES[0], is_int8, False, torch.bfloat16
        yield SHAPES[-1], is_int8, True, torch.bfloat16


def describe(
    shape: tuple[int, int, int], is_int8: bool, has_options: bool, dtype: torch.dtype
) -> str:
    """A form in words."""
    words = ["/".join(map(str, shape)), str(dtype).removeprefix("torch.")]
    words += ["int8 cache"] * is_int8 + ["window, soft cap, sinks"] * has_options
    return " ".join(words)


def summarize(rows: list[Row]) -> list[str]:
    """A Markdown table with a line for each kernel and card: the worst over its forms."""
    lines = [
        "| kernel | card | forms | spilled, bytes | scratch messages | `dpas` | sends | fp64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card, kernel in sorted({(row.card, row.kernel) for row in rows}):
        forms = [row for row in rows if (row.card, row.kernel) == (card, kernel)]
        sends = [row.sends for row in forms]
        lines.append(
            f"| `{kernel}` | {card} | {len(forms)} | {max(row.spill_bytes for row in forms)} "
            f"| {max(row.scratch for row in forms)} | {max(row.matrix for row in forms)} "
            f"| {min(sends)} to {max(sends)} | {max(row.fp64 for row in forms)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", default="acm-g10,pvc", help="devices of ocloc")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    args = parser.parse_args()
    rows = []
    for card in args.cards.split(","):
        for row in compile_all(card):
            rows.append(row)
            print(
                f"{card} {row.kernel} ({row.shape}): spilled {row.spill_bytes}, scratch "
                f"{row.scratch}, dpas {row.matrix}, sends {row.sends}",
                flush=True,
            )
    table = summarize(rows)
    print("\n".join(table))
    if args.markdown:
        args.markdown.write_text("\n".join(table) + "\n")
    mistakes = [
        f"{row.card}: {row.kernel} ({row.shape}) {row.mistake}" for row in rows if row.mistake
    ]
    print(f"{len(rows)} kernels compiled, {len(mistakes)} of them with mistakes")
    sys.exit("\n".join(mistakes) if mistakes else 0)


if __name__ == "__main__":
    main()
