"""The order of bytes on a CUDA card: nothing is lost, and views of joined weights are right."""

from __future__ import annotations

import pytest
import torch

from autotp_serving.kernels.cuda import tiles
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.tensor import quantize


def draw_weight(name: str, rows: int, columns: int):
    generator = torch.Generator().manual_seed(rows + columns)
    return quantize(torch.randn(rows, columns, generator=generator), FORMATS[name])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(48, 192), (35, 130), (16, 64)])
def test_the_order_can_be_undone(name, rows, columns, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_WEIGHTS", 2**12)  # several chunks
    weight = draw_weight(name, rows, columns)
    tiled = tiles.tile(weight)
    assert {plane.shape[0] for plane in tiled.planes.values()} == {-(-rows // 16) * 16}
    back = tiled.canonical().planes
    assert all(torch.equal(back[plane], weight.planes[plane]) for plane in weight.planes)


def test_a_lane_finds_its_rows_and_columns_where_the_kernels_look():
    codes = torch.arange(16 * 64).remainder(251).to(torch.uint8).view(16, 64)
    planes = {"codes": codes, "scales": torch.arange(16.0)[:, None]}
    tiled = tiles.tile(tiles.LowBitTensor(FORMATS["sym_int8"], (16, 64), planes))
    lanes = tiled.planes["codes"].view(2, 32, 16)  # [h][lane][row half, q, i]
    for lane, h, half, q, i in ((0, 0, 0, 0, 0), (13, 1, 1, 0, 3), (31, 1, 0, 1, 2)):
        row, column = lane // 4 + 8 * half, h * 32 + lane % 4 * 8 + q * 4 + i
        assert lanes[h, lane, half * 8 + q * 4 + i] == codes[row, column]
    assert tiled.planes["scales"].flatten().tolist()[:4] == [0.0, 8.0, 1.0, 9.0]


def test_views_of_joined_weights_are_the_weights():
    parts = [draw_weight("asym_int5", rows, 128) for rows in (32, 48, 20)]
    joined = tiles.join_tiles([tiles.tile(part) for part in parts])
    assert joined.shape == (100, 128)
    start = 0
    for part in parts:
        view = joined.slice_tiles(start, start + part.shape[0])
        assert view.planes["codes"].untyped_storage().data_ptr() == (
            joined.planes["codes"].untyped_storage().data_ptr()
        )
        back = view.canonical().planes
        assert all(torch.equal(back[name], part.planes[name]) for name in part.planes)
        start += part.shape[0]
