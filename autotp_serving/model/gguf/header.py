"""The head of a GGUF file: its metadata, and where each tensor is. Every rank, without torch.

A file comes from strangers: every count and length is bounded, and held against what is there,
before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_serving.model_folder import ModelFolderError, check_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_HEADER_BYTES = 2**28
"""The largest vocabularies that are published take 20 MB of it."""
MAX_ENTRIES = 4096
MAX_TENSORS = 2**17
MAX_NAME_BYTES = 256
MAX_TEXT_BYTES = 2**20
MAX_ITEMS = 2**21
"""Of an array: a vocabulary, or its merges."""
MAX_TOKEN_BYTES = 512
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**48
MAX_ALIGNMENT = 2**16

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
FLOAT32, TEXT, ARRAY = 6, 8, 9


class GgufError(ModelFolderError):
    """A GGUF file that cannot be served; the message names it and the cure."""


@dataclass(frozen=True)
class TensorType:
    """How the numbers of a tensor are stored.

    Attributes:
        block: numbers that are stored together, always of one row.
        num_bytes: of a block.
    """

    name: str
    block: int
    num_bytes: int


TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
}
PLAIN_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file.

    Attributes:
        shape: as in torch, rows before columns.
        offset: from the beginning of the file.
    """

    path: Path
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: all of its last dimension."""
        return self.shape[-1] // self.type.block * self.type.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What the head of a file says.

    Attributes:
        metadata: numbers, texts and lists of them, by key.
        num_bytes: of the file up to the first tensor.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    num_bytes: int


def read_header(path: Path, *, is_whole: bool = True) -> GgufHeader:
    """Read the head of one file.

    Args:
        is_whole: False for the beginning of a file, whose tensors are not there.

    Raises:
        GgufError: no GGUF file, one that is cut short, or one that asks for more than any model.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise GgufError(f"{path} is cut short, or no GGUF file: download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Reader(path, data, min(size, MAX_HEADER_BYTES)), size, is_whole)
    except OSError as error:
        raise GgufError(f"{path} cannot be read ({error.strerror})") from error


def _parse(reader: _Reader, size: int, is_whole: bool) -> GgufHeader:
    if reader.take(4) != MAGIC:
        raise reader.refuse("is no GGUF file")
    version, num_tensors, num_entries = reader.unpack("<IQQ")
    if version not in VERSIONS:
        raise reader.refuse(
            f"has version {version if version < 2**16 else 'for a big-endian machine'} of GGUF, "
            f"and versions {VERSIONS[0]} and {VERSIONS[1]} are read"
        )
    if num_tensors > MAX_TENSORS or num_entries > MAX_ENTRIES:
        raise reader.refuse(f"claims {num_tensors} tensors and {num_entries} settings")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = reader.name()
        if key in metadata:
            raise reader.refuse(f"has {key!r:.80} twice")
        metadata[key] = reader.value(key)
    entries = {}
    for _ in range(num_tensors):
        name = reader.name()
        if name in entries:
            raise reader.refuse(f"has the tensor {name!r:.80} twice")
        entries[name] = _read_entry(reader, name)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
        raise reader.refuse(f"aligns its tensors to {alignment!r:.20}")
    start = -(-reader.position // alignment) * alignment
    tensors = {
        name: StoredTensor(reader.path, shape, type, start + offset)
        for name, (shape, type, offset) in entries.items()
    }
    for name, tensor in tensors.items():
        if is_whole and tensor.offset + tensor.num_bytes > size:
            raise reader.refuse(f"is cut short: {name} ends behind its end")
    return GgufHeader(metadata, tensors, start)


def _read_entry(reader: _Reader, name: str) -> tuple[tuple[int, ...], TensorType, int]:
    (num_dimensions,) = reader.unpack("<I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise reader.refuse(f"gives {name!r:.80} {num_dimensions} dimensions")
    shape = tuple(reversed(reader.unpack(f"<{num_dimensions}Q")))
    type_id, offset = reader.unpack("<IQ")
    type = TYPES.get(type_id)
    if type is None:
        known = ", ".join(one.name for one in TYPES.values())
        raise reader.refuse(
            f"stores {name!r:.80} in type {type_id} of ggml, which is not read: choose a file in "
            f"one of {known}",
            cure=False,
        )
    if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS or shape[-1] % type.block:
        raise reader.refuse(f"gives {name!r:.80} the shape {shape} in {type.name}")
    return shape, type, offset


class _Reader:
    """Takes values off the beginning of a file, none of which may reach behind its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.position = 0
        self._data = data
        self._size = size

    def refuse(self, what: str, *, cure: bool = True) -> GgufError:
        return GgufError(f"{self.path} {what}{': download it again' if cure else ''}")

    def take(self, num_bytes: int) -> bytes:
        stop = self.position + num_bytes
        if stop > self._size:
            raise self.refuse("is cut short, or damaged")
        found = self._data[self.position : stop]
        self.position = stop
        return found

    def unpack(self, format: str) -> tuple[Any, ...]:
        return struct.unpack(format, self.take(struct.calcsize(format)))

    def text(self, max_bytes: int) -> str:
        (num_bytes,) = self.unpack("<Q")
        if num_bytes > max_bytes:
            raise self.refuse(f"has a text of {num_bytes} bytes where {max_bytes} are the most")
        try:
            return self.take(num_bytes).decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"has a text that is no UTF-8 ({error.reason})") from error

    def name(self) -> str:
        """Of a setting or a tensor: goes into messages and logs as it is."""
        found = self.text(MAX_NAME_BYTES)
        if not found.isprintable():
            raise self.refuse(f"has the name {found!r:.80}")
        return found

    def value(self, key: str) -> Any:
        (kind,) = self.unpack("<I")
        if kind in SCALARS:
            value = self.unpack(SCALARS[kind])[0]
            return _shorten(value) if kind == FLOAT32 else value
        if kind == TEXT:
            return self.text(MAX_TEXT_BYTES)
        if kind != ARRAY:
            raise self.refuse(f"has a value of kind {kind} under {key!r:.80}")
        inner, count = self.unpack("<IQ")
        if count > MAX_ITEMS or inner not in (TEXT, *SCALARS):
            raise self.refuse(f"has a list of {count} items of kind {inner} under {key!r:.80}")
        if inner == TEXT:
            return [self.text(MAX_TOKEN_BYTES) for _ in range(count)]
        return list(self.unpack(f"<{count}{SCALARS[inner][1]}"))


def _shorten(value: float) -> float:
    """The shortest number that is the same in float32: what was written, such as 1e-05."""
    exact = struct.pack("<f", value)
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if abs(short) <= abs(value) * 2 and struct.pack("<f", short) == exact:
            return short
    return value
