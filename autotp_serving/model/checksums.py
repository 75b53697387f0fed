"""Checksums of stored tensors: made when --save-low-bit has written them, compared at reload. Every
rank.

A bit that flips on a disk or on the way from it changes answers without an error anywhere. Of the
tensors in a folder each rank of a host reads its share whole, while the model is filled from
slices, which no checksum of whole tensors fits. CRC-32 because the standard library computes it
faster than a disk delivers.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from autotp_serving.distributed.launch import RankGroup
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.stored_tensors import CheckpointError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**20  # stays in the processor's cache between being read and being summed


def compute_checksums(path: Path) -> dict[str, str]:
    """Checksums of all tensors of a safetensors file, by name, as eight hexadecimal digits."""
    header, start = _read_header(path)
    return {
        name: _compute(path, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def check_checksums(checkpoint: Any, group: RankGroup) -> None:
    """Compare this rank's share of the stored tensors with what was noted when they were saved.

    Every host has its own files, so the ranks of a host share the work among themselves.

    Args:
        checkpoint: a `Checkpoint`; one without low-bit tensors has no checksums, and is left alone.

    Raises:
        CheckpointError: a tensor that has changed, or one without checksum; named.
    """
    if not isinstance(checkpoint, Checkpoint) or checkpoint.low_bit is None:
        return
    expected = checkpoint.checksums
    if expected is None:
        if group.rank == 0:
            logger.warning(
                "%s was saved without checksums: its weights are not checked (save it again)",
                checkpoint.folder,
            )
        return
    headers = {path: _read_header(path) for path in set(checkpoint.files.values())}
    stored = {name: (path, *headers[path]) for name, path in checkpoint.files.items()}
    if missing := sorted(set(stored) - set(expected)):
        raise CheckpointError(
            f"{checkpoint.folder}: there is no checksum of {missing[0]}: save the model again"
        )
    names = sorted(stored, key=lambda name: (-_num_bytes(stored[name][1][name]), name))
    mine = names[group.local_rank :: group.local_size]

    def check(name: str) -> None:
        path, header, start = stored[name]
        found = _compute(path, header[name], start)
        if found != expected[name]:
            raise CheckpointError(
                f"{path}: {name} is damaged (its checksum is {found}, not {expected[name]}): "
                "copy the folder again, or save the model again"
            )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(check, mine):
            pass


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file that `Checkpoint` has opened, and where its data begin."""
    with path.open("rb") as file:
        (num_bytes,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(num_bytes)), 8 + num_bytes


def _num_bytes(entry: dict[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return last - first


def _compute(path: Path, entry: dict[str, Any], start: int) -> str:
    """Of a tensor's type, its shape and its bytes as they are in the file."""
    shape = ",".join(map(str, entry["shape"]))
    checksum = zlib.crc32(f"{entry['dtype']} {shape}".encode())
    left = _num_bytes(entry)
    buffer = memoryview(bytearray(min(left, CHUNK_BYTES)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start + entry["data_offsets"][0])
            while left:
                count = file.readinto(buffer[: min(left, CHUNK_BYTES)])
                if not count:
                    raise CheckpointError(f"{path} is cut short: copy the folder again")
                checksum = zlib.crc32(buffer[:count], checksum)
                left -= count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): copy the folder again") from error
    return f"{checksum:08x}"
