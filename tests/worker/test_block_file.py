"""A rank's files of KV blocks: what comes back is what went there, or nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.kernels.reference.attention import ReferenceCache
from autotp_serving.model.kv_cache import KVCache, KVCacheShape
from autotp_serving.worker.block_file import BlockFile

KEYS = [bytes([number]) * 32 for number in range(1, 10)]
IDENTITY = b"i" * 32
NUM_BLOCKS = 4


def make_cache(is_int8: bool) -> KVCache:
    shapes = ((2, 8, 8), (1, 8, 4), (0, 8, 8))  # of the last the keys are another layer's
    shape = KVCacheShape(shapes, 4, torch.bfloat16, is_int8)
    cache = KVCache(shape, NUM_BLOCKS, torch.device("cpu"), ReferenceCache())
    for view in cache.view_blocks():
        view.random_(0, 100)
    return cache


@pytest.fixture(params=[False, True], ids=["plain", "int8"])
def cache(request: pytest.FixtureRequest) -> KVCache:
    return make_cache(request.param)


@pytest.fixture
def begin(tmp_path: Path, cache: KVCache) -> Callable[..., BlockFile]:
    """Open the files, those of the server before closed."""
    opened: list[BlockFile] = []

    def begin(identity: bytes = IDENTITY, num_slots: int = 8) -> BlockFile:
        while opened:
            opened.pop().close()
        num_bytes = sum(view.shape[1] for view in cache.view_blocks())
        file = BlockFile(tmp_path / "kv", 0, identity, cache, num_slots * num_bytes)
        opened.append(file)
        return file

    return begin


def read(cache: KVCache, block: int) -> bytes:
    return torch.cat([view[block] for view in cache.view_blocks()]).numpy().tobytes()


def list_held(file: BlockFile) -> list[tuple[int, bytes]]:
    return [one for one in file.agree(LocalRankGroup()) if one[1]]


def test_blocks_come_back_after_a_restart_the_oldest_written_first(begin, cache, tmp_path):
    file = begin()
    before = [read(cache, block) for block in range(NUM_BLOCKS)]
    file.run(BlockTransfer(stores=[(block, 5 - block, KEYS[block]) for block in range(3)]))
    file.run(BlockTransfer(drops=[4], stores=[(3, 5, KEYS[3])]))
    file = begin()
    assert list_held(file) == [(3, KEYS[2]), (5, KEYS[3])]
    assert file.run(BlockTransfer(loads=[(0, 5, KEYS[3]), (1, 3, KEYS[2])])) == [False, False]
    assert [read(cache, block) for block in range(2)] == [before[3], before[2]]
    for path in (tmp_path / "kv").iterdir():
        assert path.stat().st_mode & 0o077 == 0, "others may read it"
    (tmp_path / "kv" / "rank-3.blocks").touch()  # of a larger group
    assert list_held(begin(num_slots=4)) == [(3, KEYS[2])]
    assert not (tmp_path / "kv" / "rank-3.blocks").exists()
    assert (tmp_path / "kv" / "rank-0.blocks").stat().st_size <= 4 * len(before[0])
    assert list_held(begin(identity=b"o" * 32)) == []
    assert list_held(begin()) == [], "what was of another model came back"


def test_what_is_cut_short_changed_or_another_is_not_loaded(begin, cache, tmp_path, caplog):
    file = begin()
    stores = [(block, block, KEYS[block]) for block in range(NUM_BLOCKS)]
    assert file.run(BlockTransfer(stores=stores)) == []
    before = read(cache, 0)
    path = tmp_path / "kv" / "rank-0.blocks"
    size = path.stat().st_size // NUM_BLOCKS
    data = bytearray(path.read_bytes())
    data[size + 7] ^= 1  # of slot 1
    path.write_bytes(data[:-1])  # slot 3 lacks a byte
    file = begin()
    loads = [(0, slot, KEYS[slot]) for slot in (1, 3)] + [(0, 2, KEYS[5]), (0, 7, KEYS[7])]
    assert file.run(BlockTransfer(loads=loads)) == [True] * 4
    assert read(cache, 0) == before, "what is damaged got into the pool"
    assert caplog.text.count("damaged") == 2
    assert list_held(begin()) == [(0, KEYS[0]), (2, KEYS[2])]


def test_a_full_disk_is_told_once_and_nothing_else(begin, cache, monkeypatch, caplog):
    file = begin()

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        file.run(BlockTransfer(stores=[(block, block, KEYS[block]) for block in range(3)]))
    assert caplog.text.count("No space left") == 1
    assert file.run(BlockTransfer(loads=[(0, 0, KEYS[0])])) == [True]


def test_a_folder_that_cannot_be_used_is_refused(begin, cache, tmp_path):
    begin()
    with pytest.raises(ConfigError, match="in use by another server"):
        BlockFile(tmp_path / "kv", 0, IDENTITY, cache, 2**20)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        BlockFile(tmp_path / "file", 0, IDENTITY, cache, 2**20)
    with pytest.raises(ConfigError, match="--kv-offload-size 7 holds no block"):
        BlockFile(tmp_path / "other", 0, IDENTITY, cache, 7)
