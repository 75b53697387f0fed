"""Which architectures are served, at how many ranks, and what is refused by name. Every rank.

A family in PROVED gives the tokens of transformers itself at one and at several ranks
(tests/ranks/test_families.py). Another one is served only if nothing in it is left to guessing:
AutoTP has sharded exactly the layers whose names say how, every layer attends through our blocks,
and the two passes of self_check.py come out as transformers means them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import GroupFailure, LaunchError
from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.model.shapes import find_heads, list_layer_configs

if TYPE_CHECKING:  # --plan asks here before torch could be imported
    from torch import nn

PROVED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)

COLUMN_NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_NAMES = ("o_proj", "down_proj")

# Of latent attention: what comes before the matrices that are sharded.
WHOLE_PARTS = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")

STATELESS_LAYERS = ("mlp", "moe")
"""What `layer_types` calls layers that see each token alone (Nemotron-H)."""

# What transformers 4 reads from `rope_scaling` as transformers 5 does from `rope_parameters`.
ROPE_SETTINGS = (
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
)


@contextlib.contextmanager
def refuse_by_name(model_config: Any) -> Iterator[None]:
    """Turn whatever the code of an unproved family raises into one line that names the family.

    Such a family was written for transformers alone, and may break on anything of ours.

    Raises:
        ConfigError: naming the family.
    """
    try:
        yield
    except (ConfigError, LowBitError, GroupFailure, LaunchError, OSError, MemoryError):
        raise
    except Exception as error:
        if model_config.model_type in PROVED:
            raise
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"the family '{model_config.model_type}' cannot be served "
            f"({type(error).__name__}: {lines[0][:200]})"
        ) from error


def check_family(model_config: Any, *, pools: bool = False) -> None:
    """Refuse what is told to be no decoder of text by its config.json alone.

    Args:
        pools: it is to embed or rerank, for which its tokens may see those after them.

    Raises:
        ConfigError: naming the family.
    """
    reason = None
    if getattr(model_config, "is_encoder_decoder", False):
        reason = "an encoder reads its prompts"
    elif pools and hasattr(model_config, "type_vocab_size"):  # BERT and what comes of it
        reason = "it is an encoder, and embeddings are made here by decoders only"
    elif is_bidirectional(model_config.get_text_config()):
        if not pools:
            reason = "its tokens see those after them, so that it cannot go on with a text"
        elif model_config.model_type not in PROVED:
            reason = "its tokens see those after them, which is done here for proved families only"
        elif getattr(model_config, "sliding_window", None):
            reason = "its tokens see those after them within a window, which is not done here"
    elif not getattr(model_config.get_text_config(), "num_attention_heads", None):
        reason = (
            "its config.json tells of no attention heads: layers that keep states alone, and none "
            "that attends, would need a server without KV blocks"
        )
    else:
        reason = find_sparse_reason(model_config.get_text_config())
    if reason:
        raise ConfigError(f"the family '{model_config.model_type}' cannot be served: {reason}")


def find_sparse_reason(text_config: Any) -> str | None:
    """Why sparse attention of this kind is not served; None where it is, or where there is none."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if any("compressed" in kind for kind in kinds):
        return (
            "its attention sees sums of tokens in the place of those far away: a cache of these "
            "beside that of the tokens is needed"
        )
    if getattr(text_config, "indexer_compress_ratio", None) or hasattr(text_config, "index_kpool"):
        return (
            "its indexer chooses runs of tokens by sums of their keys: a cache of these, and "
            "attention to the runs, are needed"
        )
    return None


def is_bidirectional(text_config: Any) -> bool:
    """True for attention without a causal mask, as some embedding models have it."""
    is_causal = getattr(text_config, "is_causal", True)
    return is_causal is False or getattr(text_config, "use_bidirectional_attention", None) is True


def check_heads(model_config: Any, num_ranks: int) -> None:
    """Refuse more ranks than there are key/value heads to give them.

    Raises:
        ConfigError: with both numbers.
    """
    layers = list_layer_configs(model_config.get_text_config())
    if not all(isinstance(find_heads(layer)[1], int) for layer in layers[:1]):
        raise ConfigError(
            f"the family '{model_config.model_type}' cannot be served: its layers differ in their "
            "numbers of key/value heads"
        )
    num_kv_heads = min(find_heads(layer)[1] for layer in layers)
    if num_ranks > num_kv_heads:
        raise ConfigError(
            f"{num_ranks} ranks cannot share the {num_kv_heads} key/value heads of this model: "
            f"start at most {num_kv_heads} ranks"
        )


def check_sharding(model: nn.Module, *, has_plan: bool) -> None:
    """Refuse an unproved family that AutoTP has sharded wrongly, or where this cannot be checked.

    Args:
        model: sharded for several ranks, on the meta device.
        has_plan: its matrices are sharded as transformers' own plan or their names have it.

    Raises:
        ConfigError: naming the family and the layer.
    """
    from torch import nn

    from autotp_serving.model.state_layers import find_state_layer

    family = model.config.model_type
    if family in PROVED:
        return
    head = model.get_output_embeddings()
    check_unsharded_parameters(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_matrix = weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding)
        if (
            module is head
            or find_state_layer(model, name) is not None
            or not (is_matrix or has_stacked_weights(module))
        ):
            continue
        if has_plan and not has_stacked_weights(module):
            continue
        last = name.rpartition(".")[2]
        expected = "LinearLayer" if last in COLUMN_NAMES else "LinearAllreduce"
        if last not in (*COLUMN_NAMES, *ROW_NAMES) or type(module).__name__ != expected:
            raise ConfigError(
                f"the family '{family}' is not known to be split rightly over several ranks "
                f"({name} is a {type(module).__name__}): start 1 rank, or one of "
                f"{', '.join(PROVED)}"
            )


def check_unsharded_parameters(model: nn.Module) -> None:
    """Refuse norms, scales or sinks of heads, or of columns, that AutoTP has sharded.

    Beside sharded layers the norm of a single head may stay whole, and a vector that is longer than
    there are heads: what it is multiplied with or added to must be as long, so that on a shard it
    would not run at all.

    Raises:
        ConfigError: naming the family and the parameter.
    """
    from autotp_serving.model.sharding_plan import GatheredNorm
    from autotp_serving.model.state_layers import StateLayer, find_state_layer
    from autotp_serving.model.token_choice import find_indexers

    indexed = {part for indexer in find_indexers(model) for part in indexer.modules()}
    config = model.config.get_text_config()
    head_dims = {find_heads(layer)[2] for layer in list_layer_configs(config)}
    for name, module in model.named_modules():
        if isinstance(module, StateLayer) or find_state_layer(model, name) is not None:
            continue  # it shares out its own
        if not any(type(child).__name__ == "LinearLayer" for child in module.children()):
            continue
        for inner_name, inner in module.named_modules():
            if type(inner).__name__ in ("LinearLayer", "LinearAllreduce") or inner in indexed:
                continue
            for own_name, parameter in inner.named_parameters(recurse=False):
                is_known = own_name == "sinks" and not inner_name  # sharded by `shard_layers`
                is_known |= parameter.numel() == 1
                is_known |= inner_name in WHOLE_PARTS or isinstance(inner.forward, GatheredNorm)
                if is_known or (
                    parameter.dim() == 1
                    and (len(parameter) in head_dims or len(parameter) > config.num_attention_heads)
                ):
                    continue
                parts = ".".join(filter(None, (name, inner_name, own_name)))
                raise ConfigError(
                    f"the family '{model.config.model_type}' is not known to be split rightly "
                    f"over several ranks ({parts} stays whole): start 1 rank, or one of "
                    f"{', '.join(PROVED)}"
                )


def has_stacked_weights(module: nn.Module) -> bool:
    """True for several matrices in one parameter, such as all experts of a layer."""
    return any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))


def check_attention(model: nn.Module, layers: set[int], block_size: int) -> None:
    """Refuse a model with layers that keep their state elsewhere than in our blocks.

    Args:
        layers: those that wrote keys and values in a first forward pass.
        block_size: tokens of a block; one may not lie in two chunks of chunked attention.

    Raises:
        ConfigError: naming the family.
    """
    from autotp_serving.model.state_layers import list_state_layers

    config = model.config.get_text_config()
    types = list(getattr(config, "layer_types", None) or ())
    known = {layer.layer_idx for layer in list_state_layers(model)}
    known |= {number for number, name in enumerate(types) if name in STATELESS_LAYERS}
    missing = sorted(set(range(config.num_hidden_layers)) - layers - known)
    if missing:
        raise ConfigError(
            f"the family '{model.config.model_type}' cannot be served: its layers {missing[:8]} do "
            "not attend through transformers' AttentionInterface, but by code or state of their own"
        )
    chunk_len = getattr(config, "attention_chunk_size", None)
    if chunk_len and chunk_len % block_size and uses_chunks(config):
        raise ConfigError(
            f"--block-size {block_size} does not divide the chunks of {chunk_len} tokens within "
            "which this model attends: choose a divisor"
        )


def uses_chunks(text_config: Any) -> bool:
    """Whether some layers attend within chunks of the sequence only."""
    return "chunked_attention" in (getattr(text_config, "layer_types", None) or ())


def adapt_rope(model_config: Any) -> None:
    """Give an older transformers the rotary settings where it looks for them.

    Transformers 5 writes them under 'rope_parameters', which an older one passes over in silence.

    Raises:
        ConfigError: settings that the older one has no place for, with both versions.
    """
    written = getattr(model_config, "rope_parameters", None)
    version = metadata.version("transformers")
    if written is None or int(version.split(".")[0]) >= 5:
        return
    scaling = dict(written)
    theta = scaling.pop("rope_theta", None)
    if theta is None or not set(scaling) <= set(ROPE_SETTINGS):
        raise ConfigError(
            "config.json has its rotary settings under 'rope_parameters', as transformers 5 writes "
            f"them, and transformers {version} has no place for {sorted(written)}: use "
            "transformers 5, or the checkpoint's original config.json"
        )
    model_config.rope_theta = theta
    model_config.rope_scaling = None if scaling.get("rope_type") == "default" else scaling
