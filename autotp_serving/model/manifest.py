"""What `--save-low-bit` wrote beside the weights: format, shape, checksum. Every rank; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_serving.low_bit.formats import FORMATS, Format
from autotp_serving.low_bit.selection import MANIFEST_NAME
from autotp_serving.model.stored_tensors import CheckpointError
from autotp_serving.model_folder import (
    MAX_LARGE_BYTES,
    ModelFolderError,
    find_file,
    read_object,
)

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """A folder's manifest.

    Attributes:
        low_bit: the --low-bit name that the folder was saved with.
        weights: format and shape of each converted weight.
        checksums: of the tensors as stored; None in folders saved before there were any.
    """

    low_bit: str
    weights: dict[str, tuple[Format, tuple[int, int]]]
    checksums: dict[str, str] | None


def read_manifest(folder: Path) -> Manifest | None:
    """Read it, where there is one.

    Raises:
        ModelFolderError: a file that leads out of the folder, or is none.
        CheckpointError: no manifest of this version.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        values = read_object(find_file(folder, MANIFEST_NAME), MAX_LARGE_BYTES)
        version, low_bit = values["version"], values["low_bit"]
        weights = {name: _read_entry(entry) for name, entry in values["tensors"].items()}
        checksums = _read_checksums(values)
        if low_bit not in FORMATS:
            raise ValueError(f"low_bit {low_bit!r}")
    except ModelFolderError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no low-bit manifest ({error!r}): save the model again"
        ) from error
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this server reads version {MANIFEST_VERSION}: "
            "save the model again"
        )
    return Manifest(low_bit, weights, checksums)


def _read_entry(entry: dict[str, Any]) -> tuple[Format, tuple[int, int]]:
    """Format and shape of a converted weight."""
    rows, cols = entry["shape"]
    if type(rows) is not int or type(cols) is not int or min(rows, cols) < 1:
        raise ValueError(f"shape {entry['shape']}")
    return FORMATS[entry["format"]], (rows, cols)


def _read_checksums(values: dict[str, Any]) -> dict[str, str] | None:
    found = values.get("crc32")
    if found is not None and not all(isinstance(value, str) for value in found.values()):
        raise ValueError("crc32")
    return found
