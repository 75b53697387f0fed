"""Load a model: build it empty, let AutoTP shard it, fill in this rank's slices. Every rank.

Nothing is ever materialized whole: the model is built on the meta device, DeepSpeed AutoTP decides
which tensor is split and how, and each rank then reads only its slice of one tensor at a time,
converts it if its weights are low-bit, and places it on its device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp_serving.collector import without_collector
from autotp_serving.config import DEFAULT_LOW_BIT, ConfigError, ServingConfig
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.kernels.ipex_llm import check_ipex_llm, convert_linear
from autotp_serving.layers.convert import check_columns, replace_linear
from autotp_serving.layers.dense_linear import take_over_linears
from autotp_serving.layers.head import PoolingHead, VocabParallelHead
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.low_bit.selection import LowBitSelection, find_low_bit_selection, is_linear
from autotp_serving.low_bit.tensor import quantize
from autotp_serving.model.build import build_sharded_model, find_dtype, rebuild_buffers
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.checksums import check_checksums
from autotp_serving.model.dummy import DummyCheckpoint
from autotp_serving.model.families import adapt_rope, check_family, refuse_by_name
from autotp_serving.model.gguf.checkpoint import GgufCheckpoint
from autotp_serving.model.gguf.folder import is_converted
from autotp_serving.model.postponed_compiler import postpone_compiler
from autotp_serving.model.quantized.settings import find_quantization
from autotp_serving.model.shards import Shard, find_head_name, find_shards
from autotp_serving.model.sizes import check_loaded_sizes, check_sizes
from autotp_serving.model.tensor_names import match_tensor_names
from autotp_serving.model.vision_language import hide_vision_tensors, take_language_model
from autotp_serving.model_folder import check_model_folder, read_object
from autotp_serving.pooling import read_pooling
from autotp_serving.progress import Progress, show_size

logger = logging.getLogger(__name__)

AllReduce = Callable[[torch.Tensor], torch.Tensor]
Convert = Callable[[nn.Module, torch.Tensor], nn.Module]


def read_model_config(config: ServingConfig) -> Any:
    """Read config.json.

    Raises:
        ConfigError: the folder is no checkpoint that transformers can read.
    """
    with without_collector():
        from transformers import AutoConfig

    folder = Path(config.model_path)
    check_model_folder(folder)
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"--repo-id-or-model-path: there is no config.json in '{folder}': "
            "name a folder that holds a Hugging Face checkpoint"
        )
    check_sizes(read_object(folder / "config.json"))
    try:
        with postpone_compiler(), without_collector():  # it imports much
            found = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # each family checks its own settings, and raises what it likes
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder / 'config.json'} cannot be used ({type(error).__name__}): {reason[:300]}"
        ) from error
    found = take_language_model(found, folder)
    for part in (found, found.get_text_config()):
        if getattr(part, "is_heterogeneous", False):  # or DeepSpeed could read no head count
            part.allow_global_per_layer_attribute_access = True
        if not hasattr(part, "tie_word_embeddings"):  # of families that never tie them
            part.tie_word_embeddings = False
        # The checkpoint reads it from the file; transformers and DeepSpeed would act on it.
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    adapt_rope(found)
    check_family(found, pools=config.pools)
    with refuse_by_name(found):
        check_loaded_sizes(found)
    return found


def load_model(
    config: ServingConfig,
    model_config: Any,
    group: RankGroup,
    device: torch.device,
    all_reduce: AllReduce,
    check: Callable[[nn.Module, Any, LowBitSelection], None] = lambda *_: None,
    keep_shards: Callable[[dict[str, Shard]], None] = lambda _: None,
) -> nn.Module:
    """Load this rank's shard of the model.

    Args:
        check: called with the model sharded and still empty, the checkpoint and the formats.
        keep_shards: called with this rank's block of each tensor, by name.

    Returns:
        The transformers model, in eval mode, whose attention runs over blocks and whose linear
        layers hold this rank's slices.

    Raises:
        ConfigError: in one line, with the cure.
    """
    checkpoint = open_checkpoint(config, model_config)
    low_bit = find_low_bit_selection(config, checkpoint.low_bit, checkpoint.is_quantized)
    convert = choose_convert(config, model_config, low_bit, device, all_reduce)
    model = build_sharded_model(
        model_config,
        find_dtype(config),
        group,
        all_reduce,
        config.trust_remote_code,
        read_pooling(config),
        expert_parallel=config.expert_parallel,
    )
    with refuse_by_name(model_config):
        hide_vision_tensors(model_config, checkpoint, is_told=group.rank == 0)
        match_tensor_names(model, checkpoint)
        shards = find_shards(model, checkpoint, group)
        keep_shards(shards)
        check(model, checkpoint, low_bit)
    check_checksums(checkpoint, group)
    log_lines(checkpoint.describe_quantized(), group)
    filler = WeightFiller(
        model, checkpoint, low_bit, convert, find_dtype(config), device, all_reduce
    )
    filler.fill(shards, show_progress=group.rank == 0)
    log_lines(filter(None, [checkpoint.describe_loss()]), group)
    take_over_linears(model, all_reduce)
    with refuse_by_name(model_config):
        rebuild_buffers(model, device)
    return model.eval()


def log_lines(lines: Iterable[str], group: RankGroup) -> None:
    """Log what holds for all ranks, once."""
    if group.rank == 0:
        for line in lines:
            logger.info("%s", line)


def open_checkpoint(
    config: ServingConfig, model_config: Any
) -> Checkpoint | DummyCheckpoint | GgufCheckpoint:
    """Where the weights come from."""
    folder = Path(config.model_path)
    if config.load_format == "dummy":
        if (quantization := find_quantization(folder)) is not None:
            logger.warning(
                "--load-format dummy makes 16-bit weights, which --low-bit converts; what %s says "
                "of quantization is not used",
                quantization.source,
            )
        return DummyCheckpoint(folder, model_config, config.trust_remote_code)
    if is_converted(folder):
        return GgufCheckpoint(folder, find_dtype(config))
    return Checkpoint(folder, config)


def choose_convert(
    config: ServingConfig,
    model_config: Any,
    low_bit: LowBitSelection,
    device: torch.device,
    all_reduce: AllReduce,
) -> Convert:
    """What makes a low-bit layer of a linear one and its weight: our code or ipex-llm's.

    Raises:
        ConfigError: ipex-llm cannot do what is asked, or is not there.
    """
    if config.low_bit_provider != "ipex-llm":
        return lambda module, weight: replace_linear(
            module, quantize(weight, low_bit.linears), all_reduce
        )
    name = config.low_bit or DEFAULT_LOW_BIT
    try:
        check_ipex_llm(name, device)
    except LowBitError as error:
        raise ConfigError(f"--low-bit-provider ipex-llm: {error}") from error
    if low_bit.linears is None:
        raise ConfigError(
            f"--low-bit-provider ipex-llm converts 16-bit checkpoints only, and "
            f"'{config.model_path}' holds low-bit weights: leave the flag out"
        )
    return lambda module, weight: convert_linear(module, weight, name, model_config)


class WeightFiller:
    """Reads, converts and places one tensor after another."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        low_bit: LowBitSelection,
        convert: Convert,
        dtype: torch.dtype,
        device: torch.device,
        all_reduce: AllReduce,
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._low_bit = low_bit
        self._convert = convert
        self._dtype = dtype
        self._device = device
        self._all_reduce = all_reduce

    def fill(self, shards: dict[str, Shard], show_progress: bool) -> None:
        """Give every parameter of the model its memory, and tell how far it is in bytes read.

        Raises:
            ConfigError: a weight that the low-bit format cannot take, named.
        """
        head_name = find_head_name(self._model)
        total = sum(self._count_bytes(name, shard) for name, shard in shards.items())
        if show_progress:
            logger.info("Loading weights: %s for this rank", show_size(total))
        progress = Progress("Loading weights", total, is_shown=show_progress)
        for name, shard in shards.items():
            try:
                progress.advance(self._place(name, shard))
            except LowBitError as error:
                raise ConfigError(f"{name} cannot be converted: {error}") from error
        self._fill_head(self._model.get_submodule(head_name), f"{head_name}.weight")

    def _count_bytes(self, name: str, shard: Shard) -> int:
        """Bytes that the shard takes in the checkpoint."""
        format = self._checkpoint.low_bit_format(name)
        if format is None:
            return shard.num_elements * self._checkpoint.itemsize(name)
        (row_start, row_stop), (col_start, col_stop) = shard.ranges
        return format.num_bytes(row_stop - row_start, col_stop - col_start)

    def _place(self, name: str, shard: Shard) -> int:
        """Read a tensor and put it where the model has a parameter or buffer of that name.

        Returns:
            The bytes that were read.
        """
        module_name, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        if self._checkpoint.low_bit_format(name) is not None:
            if not (is_linear(module) or isinstance(module, VocabParallelHead)):
                raise LowBitError(
                    f"a {type(module).__name__} takes no low-bit weight "
                    f"(--modules-to-not-convert {module_name.rpartition('.')[2]} decodes it)"
                )
            check_columns(shard.ranges[1], shard.full_shape[1])
            weight = self._checkpoint.read_low_bit(name, shard.ranges).to(self._device)
            if isinstance(module, VocabParallelHead):
                module.set_low_bit(LowBitLinear(weight))
            else:
                linear = replace_linear(module, weight, self._all_reduce)
                self._model.set_submodule(module_name, linear)
            return weight.num_bytes
        tensor = self._checkpoint.read(name, shard.ranges, self._dtype).to(self._device)
        if attribute == "weight" and self._low_bit.converts(module_name, module):
            check_columns(shard.ranges[1], shard.full_shape[1])
            self._model.set_submodule(module_name, self._convert(module, tensor))
        elif attribute in module._parameters:
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            module._buffers[attribute] = tensor
        return self._count_bytes(name, shard)

    def _fill_head(self, head: VocabParallelHead | PoolingHead, weight_name: str) -> None:
        """Tie the head where the checkpoint does, and make it low-bit where that is asked."""
        if isinstance(head, PoolingHead):
            if head.label_tokens:
                self._take_labels(head, weight_name)
            return
        if self._model.config.get_text_config().tie_word_embeddings:
            head.tie_to(self._model.get_input_embeddings().weight)
        if head.low_bit is not None:
            return
        if self._checkpoint.low_bit_format(weight_name) is not None:  # of a tied head
            rows = (head.start, head.stop)
            cols = (0, self._checkpoint.shape(weight_name)[1])
            weight = self._checkpoint.read_low_bit(weight_name, (rows, cols))
            head.set_low_bit(LowBitLinear(weight.to(self._device)))
        elif self._low_bit.head is not None:
            head.set_low_bit(LowBitLinear(quantize(head.weight, self._low_bit.head)))

    def _take_labels(self, head: PoolingHead, weight_name: str) -> None:
        """Make a classifier of some rows of the output head, which may be the embedding.

        Raises:
            ConfigError: there is no such row.
        """
        if max(head.label_tokens) >= head.vocab_size:
            raise ConfigError(f"the model has no rows of the tokens {head.label_tokens}")
        if self._model.config.get_text_config().tie_word_embeddings:
            rows = self._model.get_input_embeddings().weight[list(head.label_tokens)].clone()
        else:
            cols = (0, head.hidden_size)
            rows = torch.cat(
                [
                    self._checkpoint.read(weight_name, ((token, token + 1), cols), self._dtype)
                    for token in head.label_tokens
                ]
            )
        head.weight = nn.Parameter(rows.to(self._device), requires_grad=False)
