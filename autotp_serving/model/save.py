"""Convert a checkpoint once and write it low-bit, for quick reloading. Every rank takes a share.

Conversion works on whole tensors, so the bytes do not depend on the number of ranks, and what was
saved at one number of ranks reloads at any other, on any device. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.low_bit.selection import MANIFEST_NAME, LowBitSelection, find_low_bit_selection
from autotp_serving.low_bit.tensor import quantize
from autotp_serving.model.build import build_on_meta, find_dtype
from autotp_serving.model.checkpoint import Checkpoint, Ranges
from autotp_serving.model.checksums import compute_checksums
from autotp_serving.model.loader import log_lines, open_checkpoint
from autotp_serving.model.manifest import MANIFEST_VERSION
from autotp_serving.model.quantized.settings import drop_quantization
from autotp_serving.model.shards import report_unused
from autotp_serving.model.tensor_names import match_tensor_names
from autotp_serving.model.vision_language import hide_vision_tensors
from autotp_serving.model_folder import INDEX_NAME, check_link
from autotp_serving.progress import Progress

logger = logging.getLogger(__name__)

FILE_BYTES = 2**29
"""Size of one file, and so about what a rank holds in memory while it converts."""

COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
MAX_COMPANION_BYTES = 2**30


def save_low_bit(config: ServingConfig, model_config: Any, group: RankGroup) -> None:
    """Convert the checkpoint into the folder `config.save_low_bit`; all ranks must call it.

    The folder appears under its name only when it is complete.

    Raises:
        ConfigError: it exists already, nothing is to be converted, or a weight cannot be.
    """
    target = Path(config.save_low_bit)
    partial = target.with_name(f"{target.name}.partial")
    if group.rank == 0:
        if target.exists():
            raise ConfigError(f"--save-low-bit: {target} exists already: name a new folder")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(partial, error) from error
    group.all_gather("folder made")
    checkpoint = open_checkpoint(config, model_config)
    hide_vision_tensors(model_config, checkpoint, is_told=group.rank == 0)
    selection = find_low_bit_selection(config, checkpoint.low_bit, checkpoint.is_quantized)
    main_format = checkpoint.main_format if checkpoint.is_quantized else selection.linears
    if main_format is None:
        raise ConfigError(
            "--save-low-bit needs a checkpoint that was not saved so already, and a --low-bit that "
            "converts"
        )
    log_lines(checkpoint.describe_quantized(), group)
    converter = _Converter(config, model_config, checkpoint, selection, group.rank == 0)
    converter.write(partial, group)
    parts = group.all_gather((converter.weight_map, converter.manifest, converter.checksums))
    log_lines(filter(None, [checkpoint.describe_loss()]), group)
    if group.rank == 0:
        try:
            for path in _list_companions(checkpoint.folder):
                shutil.copy(path, partial)
            if checkpoint.is_quantized:
                drop_quantization(partial)
        except OSError as error:
            raise _cannot_write(partial, error) from error
        weight_map, tensors, checksums = (
            {name: value for part in parts for name, value in part[kind].items()}
            for kind in range(3)
        )
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        manifest = {
            "version": MANIFEST_VERSION,
            "low_bit": main_format.name,
            "tensors": dict(sorted(tensors.items())),
            "crc32": dict(sorted(checksums.items())),
        }
        try:
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=1))
            (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
            partial.rename(target)
        except OSError as error:
            raise _cannot_write(partial, error) from error
        logger.info("Saved: serve it with --repo-id-or-model-path %s", target)


def _list_companions(folder: Path) -> list[Path]:
    """Config, tokenizer, template and licence files beside the weights."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern)}
    companions = sorted(path for path in found if path.is_file() and path.name != INDEX_NAME)
    for path in companions:
        check_link(folder, path)
        if path.stat().st_size > MAX_COMPANION_BYTES:
            raise ConfigError(
                f"--save-low-bit copies what belongs to the weights, and {path} has "
                f"{path.stat().st_size >> 20} MiB: move it out of the folder"
            )
    return companions


def _cannot_write(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"--save-low-bit: {path} cannot be written ({error}): is there room on the disk, and may "
        "you write there?"
    )


class _Converter:
    """Converts and writes one rank's share of the tensors."""

    def __init__(
        self,
        config: ServingConfig,
        model_config: Any,
        checkpoint: Checkpoint,
        selection: LowBitSelection,
        is_reporter: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = find_dtype(config)
        model = build_on_meta(model_config, self._dtype, config.trust_remote_code)
        match_tensor_names(model, checkpoint)
        report_unused(model, checkpoint, is_reporter=is_reporter)
        head_name = next(
            name
            for name, module in model.named_modules()
            if module is model.get_output_embeddings()
        )
        self._head_weight = f"{head_name}.weight"
        embedding_name = next(
            name
            for name, value in model.named_parameters()
            if value is model.get_input_embeddings().weight
        )
        is_tied = model_config.get_text_config().tie_word_embeddings
        # What is stored under a name, and where it is read from: a converted tied head is stored
        # beside the embedding that it comes from.
        self._sources = {name: name for name in checkpoint.names()}
        if is_tied and selection.head is not None:
            self._sources[self._head_weight] = embedding_name
        self._formats = {self._head_weight: selection.head} | {
            f"{name}.weight": selection.linears
            for name, module in model.named_modules()
            if name != head_name and selection.converts(name, module)
        }
        self.weight_map: dict[str, str] = {}
        self.manifest: dict[str, Any] = {}
        self.checksums: dict[str, str] = {}

    def write(self, folder: Path, group: RankGroup) -> None:
        """Convert every size-th tensor, largest first, and write files of about FILE_BYTES."""
        sizes = {
            name: math.prod(self._checkpoint.shape(source))
            for name, source in self._sources.items()
        }
        mine = sorted(sizes, key=lambda name: (-sizes[name], name))[group.rank :: group.size]
        tensors: dict[str, torch.Tensor] = {}
        file_number = 0
        progress = Progress("Converting", len(mine), "tensors", is_shown=group.rank == 0)
        for position, name in enumerate(mine):
            tensors |= self._convert(name)
            progress.advance()
            held = sum(tensor.nbytes for tensor in tensors.values())
            if held >= FILE_BYTES or position == len(mine) - 1:
                file_name = f"model-{group.rank:02d}-{file_number:05d}.safetensors"
                try:
                    save_file(tensors, folder / file_name, metadata={"format": "pt"})
                    self.checksums |= compute_checksums(folder / file_name)
                except (OSError, SafetensorError) as error:
                    raise _cannot_write(folder / file_name, error) from error
                self.weight_map |= dict.fromkeys(tensors, file_name)
                tensors = {}
                file_number += 1

    def _convert(self, name: str) -> dict[str, torch.Tensor]:
        """Read one tensor whole and make of it what is stored."""
        source = self._sources[name]
        shape = self._checkpoint.shape(source)
        ranges = tuple((0, size) for size in shape)
        stored = self._checkpoint.low_bit_format(source)
        try:
            if stored is not None:
                weight = self._checkpoint.read_low_bit(source, ranges)
                self.manifest[name] = {"format": stored.name, "shape": list(shape)}
                return weight.to_dict(name)
            return self._convert_dense(name, source, ranges)
        except LowBitError as error:
            raise ConfigError(f"{name} cannot be converted: {error}") from error

    def _convert_dense(self, name: str, source: str, ranges: Ranges) -> dict[str, torch.Tensor]:
        """The same of a tensor that is stored in 16 bits, or decoded to them."""
        tensor = self._checkpoint.read(source, ranges)
        format = self._formats.get(name)
        if format is None:
            return {name: tensor}
        self.manifest[name] = {"format": format.name, "shape": list(tensor.shape)}
        return quantize(tensor.to(self._dtype), format).to_dict(name)
