"""Products of many tokens on a Hopper card: how they are cut, and each way against float64."""

from __future__ import annotations

import pytest
import torch

from autotp_serving.kernels.cuda.wide_products import (
    CAPABILITY,
    SHARED_BYTES,
    TILINGS,
    lay_out,
    multiply_wide,
    plan,
)
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.tensor import dequantize, quantize


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY


@pytest.mark.parametrize("name", FORMATS)
def test_shared_memory_holds_every_tiling(name):
    for tiling in TILINGS:
        layout = lay_out(name, tiling)
        assert layout.num_bytes <= SHARED_BYTES, tiling
        assert layout.stages >= 4, tiling


@pytest.mark.parametrize("rows", [16, 4096, 4112, 22016, 32000])
def test_a_plan_takes_every_row_once(rows):
    for token_tiles in (1, 2, 8, 33):
        for processors in (78, 114, 132):
            parts = plan(token_tiles, rows, 4096, processors)
            next_row = 0
            for part in parts:
                assert part.first * part.tiling.rows == next_row
                next_row += part.row_blocks * part.tiling.rows
            assert next_row - parts[-1].tiling.rows < rows <= next_row


@pytest.mark.skipif(not has_hopper(), reason="there is no Hopper card here")
@pytest.mark.parametrize("tiling", [None, *TILINGS])
def test_every_tiling_gives_the_product(tiling):
    from autotp_serving.kernels.cuda.activations import Rounding, quantize_tokens
    from autotp_serving.kernels.cuda.tiles import tile

    torch.manual_seed(0)
    for rows, columns in ((36, 64), (4112, 1088), (22016, 256)):
        weight = quantize(torch.randn(rows, columns, device="cuda") * 0.02, FORMATS["sym_int4"])
        tiled, dense = tile(weight), dequantize(weight).double().t()
        x = torch.randn(1024, columns, device="cuda", dtype=torch.bfloat16)
        for num_tokens in (65, 129, 1000, 1024):
            out = multiply_wide(quantize_tokens(x[:num_tokens], Rounding.WIDE), tiled, tiling)
            expected = x[:num_tokens].double() @ dense
            error = (out.double() - expected).norm() / expected.norm()
            assert error < 4e-3, (rows, columns, num_tokens)
