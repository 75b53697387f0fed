"""Load a model: build it without memory, let AutoTP cut it, fill in this rank's slices. Every rank.

Nothing is ever materialized whole: the model is built on the meta device, DeepSpeed AutoTP decides
which tensor is split and how, and each rank then reads only its slice of one tensor at a time,
converts it if its weights are low-bit, and places it on its device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.low_bit.convert import LowBitPlan
from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.model.build import build_sharded_model, rebuild_buffers
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.shards import Shard, find_head_name, find_shards
from autotp_serving.ranks import Control

logger = logging.getLogger(__name__)

AllReduce = Callable[[torch.Tensor], torch.Tensor]


def find_dtype(config: ServingConfig) -> torch.dtype:
    """Type of weights that stay dense, and of activations."""
    if config.dtype == "auto":
        return torch.float16 if config.low_bit == "fp16" else torch.bfloat16
    return getattr(torch, config.dtype)


def read_model_config(config: ServingConfig) -> Any:
    """Read config.json.

    Raises:
        ConfigError: the folder is no checkpoint that transformers can read.
    """
    from transformers import AutoConfig

    folder = Path(config.model_path)
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"--repo-id-or-model-path: there is no config.json in '{folder}': "
            "name a folder that holds a Hugging Face checkpoint"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {reason[:300]}") from error


def load_model(
    config: ServingConfig,
    model_config: Any,
    control: Control,
    device: torch.device,
    all_reduce: AllReduce,
) -> nn.Module:
    """Load this rank's shard of the model.

    Returns:
        The transformers model, in eval mode, whose attention runs over pages and whose linear
        layers hold this rank's slices.

    Raises:
        ConfigError: in one line, with the cure.
    """
    try:
        low_bit = LowBitPlan.from_names(
            config.low_bit, config.lm_head_low_bit, config.modules_to_not_convert
        )
    except LowBitError as error:
        raise ConfigError(f"--low-bit: {error}") from error
    checkpoint = Checkpoint(Path(config.model_path))
    model = build_sharded_model(
        model_config, find_dtype(config), control, all_reduce, config.trust_remote_code
    )
    shards = find_shards(model, checkpoint, control)
    filler = WeightFiller(model, checkpoint, low_bit, find_dtype(config), device, all_reduce)
    filler.fill(shards, show_progress=control.rank == 0)
    rebuild_buffers(model, device)
    return model.eval()


class WeightFiller:
    """Reads, converts and places one tensor after another."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        low_bit: LowBitPlan,
        dtype: torch.dtype,
        device: torch.device,
        all_reduce: AllReduce,
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._low_bit = low_bit
        self._dtype = dtype
        self._device = device
        self._all_reduce = all_reduce

    def fill(self, shards: dict[str, Shard], show_progress: bool) -> None:
        """Give every parameter of the model its memory, with a progress bar in bytes read.

        Raises:
            ConfigError: a weight that the low-bit format cannot take, named.
        """
        head_name = find_head_name(self._model)
        total = sum(self._dtype.itemsize * shard.num_elements for shard in shards.values())
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc="Loading weights",
            disable=not show_progress,
        ) as bar:
            for name, shard in shards.items():
                tensor = self._checkpoint.read(name, shard.ranges)
                tensor = tensor.to(self._device).to(self._dtype)
                bar.update(tensor.nbytes)
                self._place(name, tensor, shard)
        head = self._model.get_submodule(head_name)
        if self._model.config.get_text_config().tie_word_embeddings:
            head.tie_to(self._model.get_input_embeddings().weight)
        self._low_bit.convert_head(head)

    def _place(self, name: str, tensor: torch.Tensor, shard: Shard) -> None:
        """Put a tensor where the model has a parameter or buffer of that name."""
        module_name, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        if attribute == "weight" and self._low_bit.converts(module_name, module):
            try:
                linear = self._low_bit.convert_linear(
                    module, tensor, shard.ranges[1], shard.full_shape[1], self._all_reduce
                )
            except LowBitError as error:
                raise ConfigError(f"{name} cannot be converted: {error}") from error
            self._model.set_submodule(module_name, linear)
        elif attribute in module._parameters:
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            module._buffers[attribute] = tensor
