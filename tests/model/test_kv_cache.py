"""The paged cache: sizes, and rows that land in their slots and nowhere else."""

from __future__ import annotations

import pytest
import torch

from autotp_serving.kernels.kv_pools import quantize
from autotp_serving.model.kv_cache import KVCache, KVCacheShape
from autotp_serving.worker.backend import choose_backend


def make_cache(shape: KVCacheShape, num_blocks: int) -> KVCache:
    device = torch.device("cpu")
    return KVCache(shape, num_blocks, device, choose_backend(device).cache(shape))


def test_bytes_of_a_block_count_all_layers_keys_and_values() -> None:
    shape = KVCacheShape(((2, 8, 8), (1, 8, 4)), block_size=16, dtype=torch.bfloat16)
    assert shape.bytes_per_block == (2 * 16 + 1 * 12) * 16 * 2
    cache = make_cache(shape, 5)
    assert cache.num_bytes == 5 * shape.bytes_per_block


@pytest.mark.parametrize(
    "dims", [(64, 64), (24, 8)]
)  # in the kernel's order, if there is one, or not
def test_bytes_of_an_int8_block_count_the_scales(dims: tuple[int, int]) -> None:
    shape = KVCacheShape(((2, *dims),) * 3, 16, torch.bfloat16, is_int8=True)
    assert shape.bytes_per_block == 3 * 2 * (sum(dims) + 8) * 16
    assert make_cache(shape, 5).num_bytes == 5 * shape.bytes_per_block


def test_rows_land_in_their_slots_of_their_layer() -> None:
    cache = make_cache(KVCacheShape(((2, 8, 4),) * 2, 4, torch.float32), 3)
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    slots = torch.tensor([11, 0, 6])
    pools = cache.write(1, slots, key, value)
    keys, values = pools.keys, pools.values
    assert keys.shape == (12, 2, 8) and values.shape == (12, 2, 4)
    assert torch.equal(keys[slots], key) and torch.equal(values[slots], value)
    others = torch.ones(12, dtype=torch.bool)
    others[slots] = False
    assert not keys[others].any() and not values[others].any()
    nothing = torch.empty(0, dtype=torch.int64)
    pools = cache.write(0, nothing, torch.empty(0, 2, 8), torch.empty(0, 2, 4))
    assert not pools.keys.any() and not pools.values.any(), "layer 1 wrote into layer 0"


def test_a_later_write_replaces_an_earlier_one() -> None:
    cache = make_cache(KVCacheShape(((1, 2, 2),), 4, torch.float32), 1)
    slot = torch.tensor([2])
    cache.write(0, slot, torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    pools = cache.write(0, slot, torch.full((1, 1, 2), 7.0), torch.ones(1, 1, 2))
    assert pools.keys[2, 0].tolist() == [7.0, 7.0]


def test_int8_rows_come_back_within_half_a_step_of_their_own_largest_number() -> None:
    torch.manual_seed(0)
    shape = KVCacheShape(((2, 8, 4),), 4, torch.float32, is_int8=True)
    cache = make_cache(shape, 3)
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    key[1] *= 1e-3  # beside large ones: a token's step is its own
    value[2, 1] *= 1e4
    slots = torch.tensor([11, 0, 6])
    pools = cache.write(0, slots, key, value)
    assert pools.keys.dtype == torch.int8
    for rows, read in zip((key, value), pools.read(slots, torch.float32), strict=True):
        half_a_step = rows.abs().amax(-1, keepdim=True) / 254
        assert ((read - rows).abs() <= half_a_step * 1.0001).all()


def test_quantize_of_extremes() -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[0.0, 0.0], [1e-40, -1e-40], [3e38, -3e38], [nan, 1.0], [inf, 1.0]])
    codes, scales = quantize(rows)
    read = codes * scales[:, None]
    assert (read[:2].abs() <= 1e-30).all()
    torch.testing.assert_close(read[2], rows[2])
    assert not read[3:].isfinite().any(), "a row that cannot be rounded must not look sound"


def test_a_layer_that_reads_anothers_keys_holds_none() -> None:
    shape = KVCacheShape(((1, 8, 4), (0, 8, 4)), 4, torch.float32, sources=(0, 0))
    assert shape.bytes_per_block == 4 * (8 + 4) * 4
    cache = make_cache(shape, 3)
    slots, key, value = torch.tensor([5]), torch.rand(1, 1, 8), torch.rand(1, 1, 4)
    written = cache.write(0, slots, key, value)
    read = cache.write(1, slots, torch.zeros_like(key), torch.zeros_like(value))
    assert read is written and torch.equal(read.keys[5], key[0])
