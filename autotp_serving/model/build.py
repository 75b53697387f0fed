"""Build the model without memory and shard it: meta device, AutoTP, our output head. Every rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autotp_serving.collector import without_collector
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.collectives import quiet_deepspeed
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.layers.head import PoolingHead, VocabParallelHead
from autotp_serving.layers.unfuse import deal_out_experts, finish_split, split_layers
from autotp_serving.model.attention import ATTENTION_NAME, register_paged_attention
from autotp_serving.model.families import PROVED, check_heads, check_sharding, refuse_by_name
from autotp_serving.model.postponed_compiler import postpone_compiler
from autotp_serving.model.shapes import find_dtype_name
from autotp_serving.model.sharding_plan import AllReduce, find_layer_sharding, shard_layers
from autotp_serving.model.state_layers import list_state_layers, replace_state_layers
from autotp_serving.model.step_hooks import StepHooks
from autotp_serving.pooling import PoolingSettings


def find_dtype(config: ServingConfig) -> torch.dtype:
    """Type of weights that stay dense, and of activations."""
    return getattr(torch, find_dtype_name(config))


def build_sharded_model(
    model_config: Any,
    dtype: torch.dtype,
    group: RankGroup,
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
    trust_remote_code: bool,
    pooling: PoolingSettings | None = None,
    *,
    expert_parallel: bool = False,
) -> nn.Module:
    """Build this rank's model on the meta device: right shapes, no memory.

    Args:
        pooling: of a model that is to embed or rerank.
        expert_parallel: each rank has whole experts, not a part of every one.

    Raises:
        ConfigError: ranks that cannot share the model, or code that must not run.
    """
    check_heads(model_config, group.size)
    model = build_on_meta(model_config, dtype, trust_remote_code)
    with refuse_by_name(model_config):
        head = model.get_output_embeddings()
        shape = None if head is None else head.weight.shape
        if expert_parallel:
            deal_out_experts(model, group.rank, group.size)
        if group.size > 1:
            _shard(model, group, dtype, all_reduce, by_plan=expert_parallel)
        finish_split(model, group.rank, group.size, all_reduce)
        _install_head(model, shape, group, all_reduce, pooling)
    if model_config.model_type not in PROVED:
        StepHooks(model)
    return model


def build_on_meta(model_config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Build the model with our attention; its parameters have shapes and no memory.

    What AutoTP cannot shard is taken apart already.
    """
    with postpone_compiler(), without_collector():
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

        register_paged_attention()
    model_config._attn_implementation = ATTENTION_NAME
    model_config.use_cache = False
    with refuse_by_name(model_config), postpone_compiler():
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    model_config, trust_remote_code=trust_remote_code
                )
        except Exception as error:  # whatever a family makes of settings that it cannot take
            if isinstance(error, KeyError) and ATTENTION_NAME in error.args:
                # A table of its own attention classes, as in older transformers.
                raise ConfigError(
                    f"the family '{model_config.model_type}' cannot be served with this version of "
                    f"transformers ({error} is not among its attentions)"
                ) from error
            reason = " ".join(str(error).split())
            if reason.startswith("Unrecognized configuration class"):
                raise ConfigError(
                    f"the family '{model_config.model_type}' cannot be served: this version of "
                    "transformers has no class of its language model alone (AutoModelForCausalLM)"
                ) from error
            raise ConfigError(
                "this model cannot be built by transformers from its config.json "
                f"({type(error).__name__}): {reason[:300]}"
            ) from error
        model = model.to(dtype)
        split_layers(model)
        replace_state_layers(model)
    return model


def _shard(
    model: nn.Module, group: RankGroup, dtype: torch.dtype, all_reduce: AllReduce, *, by_plan: bool
) -> None:
    """Shard the model by transformers' plan, or else as AutoTP finds right.

    Args:
        by_plan: of proved families too, as AutoTP would shard experts that are whole.
    """
    for layer in list_state_layers(model):
        layer.plan_shares(group.size)
    is_asked = by_plan or model.config.model_type not in PROVED
    sharding = find_layer_sharding(model) if is_asked else None
    if by_plan and sharding is None:
        raise ConfigError(
            f"--expert-parallel: nothing tells how the family '{model.config.model_type}' is split "
            "beside its experts: leave the flag out"
        )
    if sharding is None:
        _shard_with_autotp(model, group.size, dtype)
    else:
        shard_layers(model, sharding, all_reduce)
        for layer in list_state_layers(model):
            layer.take_share(group.rank, group.size, all_reduce)
    check_sharding(model, has_plan=sharding is not None)


def _shard_with_autotp(model: nn.Module, num_ranks: int, dtype: torch.dtype) -> None:
    """Have DeepSpeed AutoTP replace the linear layers by sharded ones, in place.

    AutoTP gives the shards memory, on the host and untouched; it is given back here.
    """
    with quiet_deepspeed():
        import deepspeed

        try:
            deepspeed.init_inference(
                model,
                tensor_parallel={"tp_size": num_ranks},
                dtype=dtype,
                keep_module_on_host=True,
            )
        except AssertionError as error:
            raise ConfigError(
                f"DeepSpeed AutoTP cannot split the family '{model.config.model_type}' "
                f"({error}): start 1 rank"
            ) from error
        except Exception as error:  # such as memory that is not there, which it takes for a moment
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"DeepSpeed AutoTP cannot split this model ({type(error).__name__}): {reason[:300]}"
            ) from error
    model.to_empty(device="meta")


def _install_head(
    model: nn.Module,
    shape: torch.Size | None,
    group: RankGroup,
    all_reduce: AllReduce,
    pooling: PoolingSettings | None,
) -> None:
    """Split the output head over the vocabulary, whatever AutoTP made of it.

    Args:
        shape: of its weight before, [vocab_size, hidden_size]; None where it names none.
    """
    head = model.get_output_embeddings()
    if shape is None:
        raise ConfigError(
            f"the family '{model.config.model_type}' cannot be served: it names no output head"
        )
    if pooling is not None:
        labels = pooling.labels, pooling.label_tokens
        model.set_output_embeddings(
            PoolingHead(shape[1], shape[0], head.weight.dtype, *labels, group.rank, group.size)
        )
        return
    fresh = VocabParallelHead(
        hidden_size=shape[1],
        vocab_size=shape[0],
        has_bias=getattr(head, "bias", None) is not None,
        dtype=head.weight.dtype,
        rank=group.rank,
        num_ranks=group.size,
        all_reduce=all_reduce,
    )
    model.set_output_embeddings(fresh)
    for module in model.modules():  # BERT has the bias once more beside its head, for checkpoints
        if module is not fresh and fresh.bias is not None and _get_bias(module) is fresh.bias:
            module.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=False)


def _get_bias(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("bias")


def rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies.

    They were born on the meta device, and AutoTP would have them in the model's type, while
    rotary frequencies must be in float32.

    Raises:
        ConfigError: a module whose buffers cannot be computed from the model's config.
    """
    for name, module in model.named_modules():
        if not module._non_persistent_buffers_set:
            continue
        if hasattr(module, "scalar_embed_scale"):  # Gemma's embedding takes no config
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
            continue
        parameters = set(inspect.signature(type(module).__init__).parameters)
        if not hasattr(module, "config") or not parameters <= {"self", "config", "device"}:
            if _initialize_buffers(model, module, device):
                continue
            raise ConfigError(
                f"{type(model).__name__} is not supported: the buffers of {name} "
                f"({type(module).__name__}) cannot be computed from config.json"
            )
        fresh = type(module)(config=module.config)
        for buffer_name in module._non_persistent_buffers_set:
            module._buffers[buffer_name] = fresh._buffers[buffer_name].to(device)


def _initialize_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> bool:
    """Have the model's own code for new weights fill a module's buffers, and nothing else.

    Returns:
        Whether it has filled them all, as it does from transformers 5 on.
    """
    kept = [*module._parameters.values(), *module._buffers.values()]
    for tensor in filter(lambda tensor: tensor is not None, kept):
        tensor._is_hf_initialized = True
    fresh = {}
    for name in module._non_persistent_buffers_set:
        old = module._buffers[name]
        unset = float("nan") if old.is_floating_point() else torch.iinfo(old.dtype).min
        fresh[name] = torch.full(old.shape, unset, dtype=old.dtype, device=device)
        module._buffers[name] = fresh[name]
    with torch.no_grad():
        model._init_weights(module)
    return all(
        not (value.isnan() if value.is_floating_point() else value == torch.iinfo(value.dtype).min)
        .any()
        .item()
        for value in fresh.values()
    )
