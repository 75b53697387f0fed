"""Names and sizes of the formats; none of it needs torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from autotp_serving.low_bit.formats import (
    ALIASES,
    FORMATS,
    NAMES,
    LowBitError,
    bits_per_weight,
    find_format,
)

from .native_layout import NATIVE_FORMATS


def test_all_names_are_there() -> None:
    wanted = (
        "sym_int4 asym_int4 sym_int5 asym_int5 sym_int8 nf4 nf3 fp4 fp6 fp8 fp8_e4m3 fp8_e5m2 "
        "woq_int4 bf16 fp16"
    )
    assert sorted(NAMES) == sorted(wanted.split())
    assert find_format("fp8") is find_format("fp8_e5m2")
    assert find_format("bf16") is None and bits_per_weight("bf16") == 16


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_block_bytes_are_those_of_ipex_llm(name: str) -> None:
    """But for fp8_e5m2, where ipex-llm stores a scale that is always 1."""
    spared = 4 if name == "fp8_e5m2" else 0
    assert find_format(name).block_bytes == NATIVE_FORMATS[name][1] - spared


def test_docs_list_every_format_with_its_bytes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "low_bit.md").read_text()
    listed = {}
    for cells, sizes in re.findall(r"^\| (`\w+`.*?) \| 64 . .*\| ([\d, ]+) \|$", text, re.M):
        names = re.findall(r"`(\w+)`", cells)
        numbers = [int(size) for size in sizes.split(",")]
        listed |= dict(zip(names, numbers * (len(names) // len(numbers)), strict=True))
    wanted = {name: find_format(name) for name in NAMES}
    assert listed == {name: format.block_bytes for name, format in wanted.items() if format}


def test_sizes() -> None:
    sym_int4 = FORMATS["sym_int4"]
    assert sym_int4.bits_per_weight == 4.25
    assert sym_int4.num_bytes(3, 64) == 3 * 34
    assert sym_int4.num_bytes(3, 65) == 3 * 68
    assert [ALIASES.get(name, name) for name in ("fp8", "woq_int4")] == ["fp8_e5m2", "sym_int4"]


@pytest.mark.parametrize("name", ["q4_k", "gguf_iq2_xxs", "sym_int4_rtn", "mixed_fp4", "int4", ""])
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(
        LowBitError, match=f"no low-bit format '{name}'; there are sym_int4, .*fp16"
    ):
        find_format(name)


def test_formats_do_not_import_torch() -> None:
    """The plan before load counts bytes without the seconds that torch takes to import."""
    code = "import sys, autotp_serving.low_bit.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
