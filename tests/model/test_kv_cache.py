"""The paged cache: sizes, and rows that land in their slots and nowhere else."""

from __future__ import annotations

import torch

from autotp_serving.model.kv_cache import KVCache, KVCacheShape


def test_bytes_of_a_page_count_all_layers_keys_and_values() -> None:
    shape = KVCacheShape(((2, 8, 8), (1, 8, 4)), block_size=16, dtype=torch.bfloat16)
    assert shape.bytes_per_block == (2 * 16 + 1 * 12) * 16 * 2
    cache = KVCache(shape, 5, torch.device("cpu"))
    pools = [pool for layer in range(2) for pool in cache.layer(layer)]
    assert sum(pool.nbytes for pool in pools) == 5 * shape.bytes_per_block


def test_rows_land_in_their_slots_of_their_layer() -> None:
    cache = KVCache(KVCacheShape(((2, 8, 4),) * 2, 4, torch.float32), 3, torch.device("cpu"))
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    slots = torch.tensor([11, 0, 6])
    keys, values = cache.write(1, slots, key, value)
    assert keys.shape == (12, 2, 8) and values.shape == (12, 2, 4)
    assert torch.equal(keys[slots], key) and torch.equal(values[slots], value)
    others = torch.ones(12, dtype=torch.bool)
    others[slots] = False
    assert not keys[others].any() and not values[others].any()
    nothing = torch.empty(0, dtype=torch.int64)
    keys, values = cache.write(0, nothing, torch.empty(0, 2, 8), torch.empty(0, 2, 4))
    assert not keys.any() and not values.any(), "layer 1 wrote into layer 0"


def test_a_later_write_replaces_an_earlier_one() -> None:
    cache = KVCache(KVCacheShape(((1, 2, 2),), 4, torch.float32), 1, torch.device("cpu"))
    slot = torch.tensor([2])
    cache.write(0, slot, torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    keys, _ = cache.write(0, slot, torch.full((1, 1, 2), 7.0), torch.ones(1, 1, 2))
    assert keys[2, 0].tolist() == [7.0, 7.0]
