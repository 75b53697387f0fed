"""This rank's share of KV blocks beyond the pool, in two files of its own. Every rank.

`rank-R.blocks` has a slot for each block, in the types of the pools; `rank-R.index` says what each
slot holds: the key, when it was written and a checksum of key and bytes. What is cut short by a
crash, or changed on the disk, so is noticed when it is read. Files of another model, format, number
of ranks or version are begun anew. They hold what prompts can be guessed from: only the owner of
the process may read them. In a folder of /dev/shm they are host memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import torch

from autotp_serving import __version__
from autotp_serving.block_transfer import KEY_BYTES, BlockTransfer
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.agreement import SHARED_SETTINGS, fingerprint
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

RECORD = struct.Struct(f"<{KEY_BYTES}sQI20x")
"""Of the index, for each slot: key, when it was written, checksum; zeros for an empty slot."""

NO_KEY = bytes(KEY_BYTES)

HEADER = struct.Struct("<8s32sQ16x")
MAGIC = b"autotpKV"
"""At the start of the index: this, what the blocks are of, bytes of a slot."""

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth")
"""Beside those that `fingerprint` looks at."""


class BlockFile:
    """Copies blocks from the pool into slots and back.

    Args:
        folder: where the files are.
        rank: whose they are.
        identity: 32 bytes that say what blocks are of; those of anything else are of no use.
        cache: the pool.
        max_bytes: that the slots may take.

    Attributes:
        num_slots: as many as fit; after `agree`, on every rank.

    Raises:
        ConfigError: the folder cannot be used, or another server uses it.
    """

    def __init__(
        self, folder: Path, rank: int, identity: bytes, cache: KVCache, max_bytes: int
    ) -> None:
        self._views = cache.view_blocks()
        self._device = cache.device
        self._sizes = [view.shape[1] for view in self._views]
        self._slot_bytes = sum(self._sizes)
        self.num_slots = max_bytes // self._slot_bytes
        if not self.num_slots:
            raise ConfigError(
                f"--kv-offload-size {max_bytes} holds no block, of {self._slot_bytes} bytes: "
                "raise it"
            )
        self._folder = folder
        self._has_failed = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._index = _open(folder / f"rank-{rank}.index")
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._blocks = _open(folder / f"rank-{rank}.blocks")
            self._records = self._read_index(identity)
        except BlockingIOError as error:
            raise ConfigError(
                f"--kv-offload-dir {folder} is in use by another server: name another folder"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"--kv-offload-dir {folder} cannot be used ({error.strerror}): name a folder that "
                "can be written"
            ) from error
        self._now = 1 + max((time for _, time, _ in self._records.values()), default=0)

    def agree(self, group: RankGroup) -> list[tuple[int, bytes]]:
        """Find what all ranks hold; all of them must call it.

        Returns:
            See Runner.stored_blocks.
        """
        self.num_slots = min(group.all_gather(self.num_slots))
        keys = [self._records.get(slot, (b"",))[0] for slot in range(self.num_slots)]
        everyone = zip(*group.all_gather(keys), strict=True)
        agreed = [of[0] if len(set(of)) == 1 else b"" for of in everyone]
        times = [self._records[slot][1] if key else 0 for slot, key in enumerate(agreed)]
        if group.rank == 0:
            self._remove_others(group.size)
            num_held = self.num_slots - agreed.count(b"")
            room = f"room for {self.num_slots}, {self._slot_bytes >> 10} KiB each on rank 0"
            logger.info("KV offload: %d blocks are stored, %s", num_held, room)
        return sorted(enumerate(agreed), key=lambda one: times[one[0]])

    def close(self) -> None:
        """Let others use the files."""
        os.close(self._blocks)
        os.close(self._index)

    def run(self, transfer: BlockTransfer) -> list[bool]:
        """Do what a transfer says; returns for each load whether it failed.

        A file that cannot be written or read is worth a line in the log, and nothing else: what is
        not stored is not found.
        """
        for slot in transfer.drops:
            self._erase(slot)
        for block, slot, key in transfer.stores:
            self._store(block, slot, key)
        return [not self._load(block, slot, key) for block, slot, key in transfer.loads]

    @torch.inference_mode()
    def _store(self, block: int, slot: int, key: bytes) -> None:
        data = torch.cat([view[block] for view in self._views]).cpu().numpy()
        checksum = zlib.crc32(data, zlib.crc32(key))
        record = RECORD.pack(key, self._now, checksum)
        try:
            _write(self._blocks, data, slot * self._slot_bytes)
            _write(self._index, record, HEADER.size + slot * RECORD.size)
        except OSError as error:
            self._records.pop(slot, None)
            self._tell(error)
            return
        self._records[slot] = key, self._now, checksum
        self._now += 1

    @torch.inference_mode()
    def _load(self, block: int, slot: int, key: bytes) -> bool:
        held, _, checksum = self._records.get(slot, (b"", 0, 0))
        if held != key:
            return False
        data = torch.empty(self._slot_bytes, dtype=torch.uint8)
        try:
            num_read = os.preadv(self._blocks, [data.numpy()], slot * self._slot_bytes)
        except OSError as error:
            self._tell(error)
            num_read = 0
        if num_read < len(data) or zlib.crc32(data.numpy(), zlib.crc32(key)) != checksum:
            logger.warning("KV offload: a stored block is damaged, and dropped")
            self._erase(slot)
            return False
        for view, part in zip(self._views, data.to(self._device).split(self._sizes), strict=True):
            view[block].copy_(part)
        return True

    def _erase(self, slot: int) -> None:
        if self._records.pop(slot, None) is None:
            return
        try:
            _write(self._index, bytes(RECORD.size), HEADER.size + slot * RECORD.size)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._has_failed:
            logger.warning("KV offload: a file cannot be written or read (%s)", error.strerror)
        self._has_failed = True

    def _remove_others(self, num_ranks: int) -> None:
        """Take away what a larger group has left."""
        for path in self._folder.glob("rank-*.*"):
            number = path.stem.removeprefix("rank-")
            if number.isdecimal() and int(number) >= num_ranks:
                path.unlink(missing_ok=True)

    def _read_index(self, identity: bytes) -> dict[int, tuple[bytes, int, int]]:
        """What the slots hold, or nothing if they are of something else."""
        header = HEADER.pack(MAGIC, identity, self._slot_bytes)
        num_bytes = HEADER.size + self.num_slots * RECORD.size
        found = os.pread(self._index, HEADER.size, 0)
        if found != header:
            if found:
                logger.info("KV offload: the files are of another model or setting: begun anew")
            for file in (self._blocks, self._index):
                os.ftruncate(file, 0)
            _write(self._index, header, 0)
            return {}
        if os.fstat(self._blocks).st_size > self.num_slots * self._slot_bytes:
            os.ftruncate(self._blocks, self.num_slots * self._slot_bytes)
        data = os.pread(self._index, num_bytes - HEADER.size, HEADER.size)
        records = RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size])
        return {slot: record for slot, record in enumerate(records) if record[0] != NO_KEY}


def find_identity(
    config: ServingConfig, group: RankGroup, cache: KVCache, max_model_len: int
) -> bytes:
    """What this rank's blocks depend on, besides their tokens: 32 bytes."""
    folder = Path(config.model_path)
    others = [path for pattern in OTHER_WEIGHTS for path in sorted(folder.glob(pattern))]
    stats = [(path.name, path.stat()) for path in others]
    what: list[Any] = [
        *(__version__, fingerprint(folder), group.rank, group.size, max_model_len),
        *(type(cache.kernels).__name__, cache.describe_blocks()),
        *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats),
        [str(getattr(config, name)) for name in SHARED_SETTINGS if name not in UNRELATED],
    ]
    return hashlib.sha256(json.dumps(what).encode()).digest()


UNRELATED = ("max_num_seqs", "max_num_batched_tokens", "step_timeout")
"""Settings that no key and value depends on."""


def open_block_file(
    config: ServingConfig, group: RankGroup, cache: KVCache, max_model_len: int
) -> BlockFile | None:
    """This rank's files, if there are to be some.

    Raises:
        ConfigError: see BlockFile.
    """
    if config.kv_offload_dir is None:
        return None
    identity = find_identity(config, group, cache, max_model_len)
    folder = Path(config.kv_offload_dir)
    return BlockFile(folder, group.rank, identity, cache, config.kv_offload_size)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write(file: int, data: Any, offset: int) -> None:
    """Write all of it. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
