"""Proof, at start, that a family nobody has tried is served as transformers means it. Every rank.

Two short passes over the loaded model, and one over its experts (expert_check.py). In the first,
each call of its attention is answered by transformers' own eager code, with the mask that
transformers makes, and by ours, which must agree: nothing that the family hands its attention may
be passed over. In the second, two sequences share a batch, and each must come out as it does alone:
no state may be kept elsewhere than in our blocks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autotp_serving.config import ConfigError
from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.kernels.reference.attention import ReferenceCache, mark_chosen
from autotp_serving.model.attention import AttentionContext, paged_attention
from autotp_serving.model.expert_check import check_experts
from autotp_serving.model.forward import PlainForward
from autotp_serving.model.shapes import find_heads, list_layer_configs
from autotp_serving.model.step_inputs import StepInputs

CHECK_NAME = "autotp_check"
FIRST_LEN, SECOND_LEN = 5, 16
NUM_SEQUENCES = 2

SHORT_WINDOW = 6
"""What windows, chunks and numbers of chosen tokens are set to meanwhile, so that they matter."""

WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "index_topk")

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.03}
"""Of attention's output, relative to its norm; logits may differ by twice as much."""


class _Recorder:
    """Stands in for the KV cache: notes who stores what, and keeps nothing."""

    block_size = 16
    is_int8 = False
    kernels = ReferenceCache()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...], float]] = []

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Pools:
        """A prefill without earlier context reads nothing back."""
        return Pools(key, value)


def check_unproved(model: nn.Module, device: torch.device) -> None:
    """Refuse a model whose attention, or whose batch, does not come out as transformers means it.

    Raises:
        ConfigError: naming the family.
    """
    family = model.config.model_type
    tolerance = TOLERANCES[model.dtype]
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(size, (FIRST_LEN + SECOND_LEN,), generator=generator).tolist()
    first, second = tokens[:FIRST_LEN], tokens[FIRST_LEN:]
    recorder = _Recorder(device)
    with _compared_attention(model):
        _run(model, [second], recorder)
    for attention, query_shape, key_shape, error in recorder.calls:
        if not error < tolerance:
            raise ConfigError(
                f"the family '{family}' cannot be served: layer {attention.layer_idx} asks its "
                f"attention for what is not done here (its output would be off by {error:.0%})"
            )
        _check_heads(model, attention, query_shape, key_shape)
    layers = [call[0].layer_idx for call in recorder.calls]
    if len(layers) != len(set(layers)):
        raise ConfigError(
            f"the family '{family}' cannot be served: a layer of it attends more than once"
        )
    alone = [_run(model, [part], _Recorder(device)) for part in (first, second)]
    together = _run(model, [first, second], _Recorder(device))
    for part, logits in zip(alone, together.split(1), strict=True):
        if part.shape != logits.shape or not _error(logits, part) < 2 * tolerance:
            raise ConfigError(
                f"the family '{family}' cannot be served: its sequences do not come out of a "
                "batch as they do alone, so it keeps state that this server does not know of"
            )
    check_experts(model, device)


def _run(model: nn.Module, sequences: list[list[int]], recorder: _Recorder) -> torch.Tensor:
    """Logits of the last token of each sequence, all of them in one flattened batch."""
    inputs = StepInputs.of_prompts(sequences, recorder.device)
    inputs = replace(inputs, logit_rows=inputs.query_starts[1:].long() - 1)
    with torch.inference_mode():
        logits = PlainForward(model, recorder)(inputs)
    if logits.shape[0] != len(sequences):
        raise ConfigError(
            f"the family '{model.config.model_type}' cannot be served: it computes the logits of "
            "all tokens, whichever are asked for"
        )
    return logits


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def _attend_twice(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Transformers' eager attention of the module's family; how far ours is from it is noted."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None or attention_context is None:
        raise ConfigError(
            f"{type(module).__name__} does not attend through transformers' AttentionInterface: "
            "this architecture cannot be served"
        )
    config = getattr(module, "config", None)
    is_cut = getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None)
    if is_cut and kwargs.get("sliding_window") is None:
        raise ConfigError(
            f"{type(module).__name__} attends to all tokens of a prompt, and transformers' cache "
            "keeps a window of them (sliding_window): this architecture cannot be served"
        )
    chosen = kwargs.get("indices")
    if chosen is not None and attention_mask is not None:  # by our indexer, which is checked itself
        is_hidden = ~mark_chosen(chosen, key.shape[2])
        least = torch.finfo(attention_mask.dtype).min
        attention_mask = attention_mask.masked_fill(is_hidden, least)
    theirs = eager(module, query, key, value, attention_mask, **kwargs)
    ours, _ = paged_attention(
        module, query, key, value, None, attention_context=attention_context, **kwargs
    )
    attention_context.cache.calls.append((module, query.shape, key.shape, _error(ours, theirs[0])))
    return theirs


def _check_heads(
    model: nn.Module, attention: nn.Module, query: tuple[int, ...], key: tuple[int, ...]
) -> None:
    """Refuse heads that are not this rank's share: a reshape may hide a wrong sharding.

    Layers may differ in their numbers of key/value heads, which are dealt out with the config's.

    Args:
        attention: a layer's; its ratio of queries to keys is that of all ranks.
        query, key: shapes [1, heads, tokens, head_dim].
    """
    head = model.get_output_embeddings()
    if head.num_ranks == 1:
        return
    config = list_layer_configs(model.config.get_text_config())[attention.layer_idx]
    num_heads, num_kv_heads, head_dim = find_heads(config)
    is_latent = getattr(config, "kv_lora_rank", None) is not None
    if is_latent:  # its keys become those of every head
        num_kv_heads = num_heads
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    share, rest = divmod(num_kv_heads, head.num_ranks)
    share += head.rank < rest
    num_queries = share * (num_heads // num_kv_heads)
    group = num_heads // num_kv_heads
    if not is_latent:
        group = getattr(attention, "num_key_value_groups", group)
    expected = (num_queries, head_dim, num_queries // group, head_dim)
    if (query[1], query[3], key[1], key[3]) != expected:
        raise ConfigError(
            f"the family '{model.config.model_type}' is not known to be split rightly over "
            f"several ranks (heads {query} and {key}): start 1 rank"
        )


@contextlib.contextmanager
def _compared_attention(model: nn.Module) -> Iterator[None]:
    """Have the model attend through `_attend_twice`, with short windows, inside the block."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(CHECK_NAME, _attend_twice)
    AttentionMaskInterface.register(CHECK_NAME, eager_mask)
    owners = [model, *model.modules()]
    configs = [owner.config for owner in owners if hasattr(owner, "config")]
    configs += [config.get_text_config() for config in configs]
    changed: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        for config in {id(config): config for config in configs}.values():
            change(config, "_attn_implementation", CHECK_NAME)
        for owner in {id(owner): owner for owner in (*owners, *configs)}.values():
            for name in WINDOW_NAMES:
                if type(getattr(owner, name, None)) is int:
                    change(owner, name, SHORT_WINDOW)
        yield
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
