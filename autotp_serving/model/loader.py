"""Load a model: build it without memory, let AutoTP cut it, fill in this rank's slices. Every rank.

Nothing is ever materialized whole: the model is built on the meta device, DeepSpeed AutoTP decides
which tensor is split and how, and each rank then reads only its slice of one tensor at a time,
straight to its device.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from autotp_serving.collectives import quiet_deepspeed
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.model.attention import ATTENTION_NAME, register_paged_attention
from autotp_serving.model.checkpoint import Checkpoint, CheckpointError
from autotp_serving.model.head import VocabParallelHead
from autotp_serving.ranks import Control

logger = logging.getLogger(__name__)

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one tensor: (start, stop) of each dimension of the whole."""

    full_shape: tuple[int, ...]
    ranges: Ranges


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


def check_heads(model_config: Any, num_ranks: int) -> None:
    """Refuse more ranks than there are key/value heads to give them.

    Raises:
        ConfigError: with both numbers.
    """
    num_kv_heads = (
        getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    )
    if num_ranks > num_kv_heads:
        raise ConfigError(
            f"{num_ranks} ranks cannot share the {num_kv_heads} key/value heads of this model: "
            f"start at most {num_kv_heads} ranks"
        )


def load_model(
    config: ServingConfig,
    model_config: Any,
    control: Control,
    device: torch.device,
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
) -> nn.Module:
    """Load this rank's shard of the model.

    Returns:
        The transformers model, in eval mode, whose attention runs over pages and whose linear
        layers hold this rank's slices.

    Raises:
        ConfigError, CheckpointError: in one line, with the cure.
    """
    checkpoint = Checkpoint(Path(config.model_path))
    dtype = find_dtype(config)
    register_paged_attention()
    model = build_on_meta(model_config, dtype, config.trust_remote_code)
    if control.size > 1:
        shard_with_autotp(model, control.size, dtype)
    install_head(model, control, all_reduce)
    shards = find_shards(model, checkpoint, control)
    fill_weights(model, checkpoint, shards, dtype, device, show_progress=control.rank == 0)
    rebuild_buffers(model, device)
    tie_head(model)
    return model.eval()


def build_on_meta(model_config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Build the model with shapes and no memory, its attention set to ours."""
    from transformers import AutoModelForCausalLM

    model_config._attn_implementation = ATTENTION_NAME
    model_config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    return model.to(dtype)


def shard_with_autotp(model: nn.Module, num_ranks: int, dtype: torch.dtype) -> None:
    """Have DeepSpeed AutoTP replace the linear layers by sharded ones, in place.

    AutoTP gives the shards memory, on the host and untouched; it is given back here.
    """
    with quiet_deepspeed():
        import deepspeed

        deepspeed.init_inference(
            model,
            tensor_parallel={"tp_size": num_ranks},
            dtype=dtype,
            keep_module_on_host=True,
        )
    model.to_empty(device="meta")


def install_head(
    model: nn.Module, control: Control, all_reduce: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Split the output head over the vocabulary, whatever AutoTP made of it."""
    text_config = model.config.get_text_config()
    head = model.get_output_embeddings()
    model.set_output_embeddings(
        VocabParallelHead(
            hidden_size=text_config.hidden_size,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            has_bias=getattr(head, "bias", None) is not None,
            dtype=head.weight.dtype,
            rank=control.rank,
            num_ranks=control.size,
            all_reduce=all_reduce,
        )
    )


def find_shards(model: nn.Module, checkpoint: Checkpoint, control: Control) -> dict[str, Shard]:
    """Find which block of each checkpoint tensor this rank keeps.

    AutoTP chose the local shapes; laid side by side in rank order they must tile the tensor.

    Raises:
        CheckpointError: a tensor is missing or the shapes do not fit, named.
    """
    local_shapes = {name: tuple(value.shape) for name, value in list_tensors(model)}
    head_name = next(
        name for name, module in model.named_modules() if isinstance(module, VocabParallelHead)
    )
    if model.config.get_text_config().tie_word_embeddings:
        local_shapes.pop(f"{head_name}.weight")
    all_shapes = control.all_gather(local_shapes)
    known = checkpoint.names()
    shards = {}
    for name, local_shape in local_shapes.items():
        if name not in known:
            raise CheckpointError(
                f"{checkpoint.folder} has no tensor {name}: it does not belong to this "
                f"architecture ({type(model).__name__}), or is incomplete"
            )
        full_shape = checkpoint.shape(name)
        rank_shapes = [shapes[name] for shapes in all_shapes]
        if len(full_shape) != len(local_shape):
            raise CheckpointError(
                f"tensor {name} has shape {full_shape}, but config.json asks for {local_shape}"
            )
        ranges = []
        for dim, full_size in enumerate(full_shape):
            sizes = [shape[dim] for shape in rank_shapes]
            if all(size == full_size for size in sizes):
                ranges.append((0, full_size))
            elif sum(sizes) == full_size:
                stops = list(itertools.accumulate(sizes))
                ranges.append((stops[control.rank] - sizes[control.rank], stops[control.rank]))
            else:
                raise CheckpointError(
                    f"tensor {name} has shape {full_shape}, but config.json and {control.size} "
                    f"ranks ask for {rank_shapes}"
                )
        shards[name] = Shard(full_shape, tuple(ranges))
    unused = sorted(known - set(shards) - {f"{head_name}.weight"})
    unused = [name for name in unused if not name.endswith("inv_freq")]
    if unused and control.rank == 0:
        logger.warning("%d tensors of the checkpoint are not used: %s", len(unused), unused[:5])
    return shards


def list_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers that a checkpoint holds, by name, shared ones once."""
    persistent = set(model.state_dict(keep_vars=True))
    buffers = ((name, value) for name, value in model.named_buffers() if name in persistent)
    return [*model.named_parameters(), *buffers]


def fill_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    shards: dict[str, Shard],
    dtype: torch.dtype,
    device: torch.device,
    show_progress: bool,
) -> None:
    """Read, convert and place one tensor after another, with a progress bar in bytes."""
    total = sum(dtype.itemsize * _count(shard.ranges) for shard in shards.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not show_progress
    ) as bar:
        for name, shard in shards.items():
            tensor = checkpoint.read(name, shard.ranges).to(dtype).to(device)
            place_tensor(model, name, tensor)
            bar.update(tensor.nbytes)


def place_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where the model has a parameter or buffer of that name."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if attribute in module._parameters:
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
    else:
        module._buffers[attribute] = tensor


def rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute anew the buffers that no checkpoint holds, such as rotary frequencies.

    AutoTP cast them to the model's type, and rotary frequencies must stay in float32.

    Raises:
        ConfigError: a module whose buffers cannot be computed from the model's config.
    """
    for name, module in model.named_modules():
        if not module._non_persistent_buffers_set:
            continue
        try:
            fresh = type(module)(config=getattr(module, "config", model.config))
        except TypeError as error:
            raise ConfigError(
                f"{type(model).__name__} is not supported: the buffers of {name} "
                f"({type(module).__name__}) cannot be computed from config.json"
            ) from error
        for buffer_name in module._non_persistent_buffers_set:
            module._buffers[buffer_name] = fresh._buffers[buffer_name].to(device)


def tie_head(model: nn.Module) -> None:
    """Where the checkpoint ties them, let the head be a view of the embedding's own memory."""
    if model.config.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().tie_to(model.get_input_embeddings().weight)


def _count(ranges: Ranges) -> int:
    """Numbers in a block."""
    product = 1
    for start, stop in ranges:
        product *= stop - start
    return product
