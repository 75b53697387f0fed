"""The tensors of GGUF files, decoded slice by slice. Each rank reads what it keeps.

Looks like `Checkpoint`. A slice is read and decoded some rows at a time, on all cores of this rank,
straight into the type in which the model keeps it: beside it there are a few megabytes of rows.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotp_serving.config import ConfigError
from autotp_serving.model.checkpoint import CheckpointError, Ranges
from autotp_serving.model.gguf.families import ROPE_TENSORS, find_family, translate_name
from autotp_serving.model.gguf.folder import list_linked, read_headers
from autotp_serving.model.gguf.header import PLAIN_TYPES, StoredTensor
from autotp_serving.model_folder import read_object

CHUNK_ELEMENTS = 2**19
"""Numbers that are decoded at once: 2 MB in float32."""


@dataclass(frozen=True)
class _Source:
    """Where the rows of a tensor of the model are.

    Attributes:
        first_row: of the stored tensor, its leading dimensions taken as one.
        head_rows: rows of one head whose halves are interleaved; 0 where rows are in order.
        offset: what was added to each number.
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    first_row: int = 0
    head_rows: int = 0
    offset: float = 0.0


class GgufCheckpoint:
    """The tensors of a model, by the names that transformers has for them.

    Attributes:
        low_bit: None, as what is stored is decoded and converted again.
        files: where each tensor is, by name.

    Raises:
        GgufError: a file that is damaged.
        CheckpointError: a tensor that the family does not have.
    """

    low_bit = None
    is_quantized = False
    checksums = None

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self._dtype = dtype
        paths = list_linked(folder)
        header = read_headers(paths)
        config = read_object(folder / "config.json")
        family = find_family(header.metadata)
        if family is None:
            raise CheckpointError(f"{paths[0]} has changed since the server was started")
        heads = {
            "q_proj": config["num_attention_heads"],
            "k_proj": config["num_key_value_heads"],
        }
        self._sources: dict[str, _Source] = {}
        self._hidden: set[str] = set()
        for stored_name, stored in header.tensors.items():
            if stored_name in ROPE_TENSORS:
                continue
            name = translate_name(family, stored_name)
            if name is None:
                raise CheckpointError(
                    f"{paths[0]} holds the tensor {stored_name!r:.80}, which the family "
                    f"'{family.model_type}' does not have: use the model's safetensors"
                )
            source = _Source(stored, stored.shape)
            if family.norm_offset and name.endswith("norm.weight"):
                source = replace(source, offset=family.norm_offset)
            kind = name.split(".")[-2]
            if family.permutes and kind in heads:
                if stored.shape[0] % (2 * heads[kind]):
                    raise CheckpointError(f"{paths[0]}: {stored_name} does not hold whole heads")
                source = replace(source, head_rows=stored.shape[0] // heads[kind])
            self._add(name, source)
        self.files = {name: source.stored.path for name, source in self._sources.items()}
        _check_decoder(header.tensors.values())

    def _add(self, name: str, source: _Source) -> None:
        """Note a tensor, or each expert's part of one that holds all of them."""
        if "{}" not in name:
            self._sources[name] = source
            return
        if len(source.shape) != 3:
            raise CheckpointError(f"{source.stored.path}: {name} is not one matrix an expert")
        experts, rows, cols = source.shape
        for expert in range(experts):
            self._sources[name.format(expert)] = replace(
                source, shape=(rows, cols), first_row=expert * rows
            )

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._sources) - self._hidden

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._sources[name].shape

    def itemsize(self, name: str) -> int:
        """Bytes of one number once it is decoded."""
        return self._dtype.itemsize

    def low_bit_format(self, name: str) -> None:
        """No tensor is stored in a format of this server's."""
        return

    def describe_quantized(self) -> list[str]:
        """Nothing is kept as it is stored."""
        return []

    def describe_loss(self) -> None:
        """What decoding and converting cost together is not measured here."""
        return

    def add_view(self, name: str, source: str, start: int, stop: int) -> None:
        """Let rows [start, stop) of a tensor count as one of their own, see `Checkpoint`."""
        found = self._sources[source]
        self._sources[name] = replace(
            found, shape=(stop - start, *found.shape[1:]), first_row=found.first_row + start
        )
        self.files[name] = found.stored.path
        self._hidden.add(source)

    def hide(self, names: set[str]) -> None:
        """Let these tensors be named no more."""
        self._hidden |= names

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode one block of a tensor into host memory.

        Args:
            name: the tensor.
            ranges: (start, stop) of each dimension.
            dtype: of the result; None for that of the checkpoint.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        source = self._sources[name]
        sizes = tuple(stop - start for start, stop in ranges)
        if len(ranges) == 1:
            return self._read_vector(source, *ranges[0]).to(dtype or self._dtype)
        if len(ranges) != 2:
            raise CheckpointError(f"{source.stored.path}: {name} is no matrix")
        (row_start, row_stop), cols = ranges
        result = torch.empty(sizes, dtype=dtype or self._dtype)
        step = max(1, CHUNK_ELEMENTS // source.stored.shape[-1])
        head = source.head_rows
        if head:  # whole heads, as a head's rows are interleaved among themselves
            step = max(head, step // head * head)
        grain = head or 1
        first, last = row_start // grain * grain, -(-row_stop // grain) * grain
        try:
            descriptor = os.open(source.stored.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{source.stored.path} cannot be read ({error})") from error

        def decode_step(start: int) -> None:
            stop = min(start + step, last)
            rows = _decode_rows(descriptor, source, start, stop, cols)
            if head:
                rows = _deinterleave(rows, head)
            low, high = max(start, row_start), min(stop, row_stop)
            if low < high:
                result[low - row_start : high - row_start] = rows[low - start : high - start]

        try:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(decode_step, range(first, last, step)))
        finally:
            os.close(descriptor)
        return result

    def _read_vector(self, source: _Source, start: int, stop: int) -> torch.Tensor:
        """Of a bias or a norm; of one that was fused, `first_row` is its first number."""
        whole = _Source(replace(source.stored, shape=(1, *source.stored.shape)), (1,))
        num_numbers = source.stored.shape[0]
        descriptor = os.open(source.stored.path, os.O_RDONLY)
        try:
            numbers = _decode_rows(descriptor, whole, 0, 1, (0, num_numbers))[0]
        finally:
            os.close(descriptor)
        if source.head_rows:
            numbers = _deinterleave(numbers, source.head_rows)
        numbers = numbers[source.first_row + start : source.first_row + stop]
        return numbers.float() - source.offset


def _decode_rows(
    descriptor: int, source: _Source, start: int, stop: int, cols: tuple[int, int]
) -> torch.Tensor:
    """Rows [start, stop) of a matrix, some of their columns, in float32 or as stored."""
    stored = source.stored
    block = stored.type.block
    first, last = cols[0] // block, math.ceil(cols[1] / block)
    data = _read_bytes(
        descriptor,
        (stop - start) * stored.row_bytes,
        stored.offset + (source.first_row + start) * stored.row_bytes,
        stored.path,
    )
    rows = data.reshape(stop - start, stored.row_bytes)
    rows = rows[:, first * stored.type.num_bytes : last * stored.type.num_bytes]
    numbers = decode(np.ascontiguousarray(rows), stored.type.name)
    return numbers[:, cols[0] - first * block : cols[1] - first * block]


def decode(data: np.ndarray[Any, Any], type_name: str) -> torch.Tensor:
    """Decode rows of bytes.

    Args:
        data: uint8 [rows, bytes of a row].

    Returns:
        [rows, numbers]; float32, or the file's own type where that is a plain one.
    """
    if type_name in PLAIN_TYPES:
        types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return torch.from_numpy(data).view(types[type_name])
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[type_name]))


def _read_bytes(descriptor: int, num_bytes: int, offset: int, path: Path) -> np.ndarray[Any, Any]:
    data = np.empty(num_bytes, dtype=np.uint8)
    view = memoryview(data)
    done = 0
    while done < num_bytes:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}): download it again") from error
        if not count:
            raise CheckpointError(f"{path} is cut short: download it again")
        done += count
    return data


def _deinterleave(rows: torch.Tensor, head_rows: int) -> torch.Tensor:
    """Bring the rows of each head into transformers' order: first halves, then second halves."""
    heads = rows.unflatten(0, (-1, head_rows // 2, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def _check_decoder(tensors: Any) -> None:
    """Refuse files that only the gguf package can decode, where it is not."""
    coded = {one.type.name for one in tensors} - set(PLAIN_TYPES)
    if not coded:
        return
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"to decode {', '.join(sorted(coded))}, pip install gguf ({error})"
        ) from error
