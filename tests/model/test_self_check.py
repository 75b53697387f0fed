"""The check of families that nobody has tried, on models made to go wrong in one way each."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.layers.unfuse import Expert, Experts
from autotp_serving.model import self_check
from autotp_serving.model.attention import paged_attention
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.self_check import check_unproved
from tests.model.families import save_family
from tests.model.gpt_oss import save_gpt_oss

CPU = torch.device("cpu")

needs_stacks = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="it keeps each expert by itself"
)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], nn.Module]:
    def load_family(name: str, dtype: str = "float32") -> nn.Module:
        save = save_gpt_oss if name == "gpt-oss" else functools.partial(save_family, name)
        folder = save(tmp_path / name)
        config = ServingConfig(model_path=str(folder), low_bit="bf16", dtype=dtype)
        model_config = read_model_config(config)
        return load_model(config, model_config, LocalRankGroup(), CPU, lambda tensor: tensor)

    return load_family


def attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "layer_idx")]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-window", "gemma2", "phi3", "gpt-neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_right_passes_and_stays_as_it_was(load: Any, name: str, dtype: str) -> None:
    model = load(name, dtype)

    def describe() -> list[Any]:
        return [
            (getattr(item, "sliding_window", None), item.config._attn_implementation)
            for item in (model, *attentions(model))
        ]

    before = describe()
    check_unproved(model, CPU)
    assert describe() == before


def test_a_bias_that_only_transformers_adds_is_found(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a position bias would come: in the mask, or by an argument of the family's own."""
    model = load("llama")
    code = sys.modules[type(attentions(model)[0]).__module__]
    eager = code.eager_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        positions = torch.arange(key.shape[2])
        return eager(module, query, key, value, mask + 0.3 * positions, **kwargs)

    monkeypatch.setattr(code, "eager_attention_forward", attend)
    with pytest.raises(ConfigError, match="'llama' cannot be served: layer 0 asks its attention"):
        check_unproved(model, CPU)


def test_a_window_that_only_the_mask_knows_is_found(load: Any) -> None:
    model = load("mistral")
    for attention in attentions(model):
        attention.config = copy.copy(attention.config)
        attention.config.sliding_window = None
    with pytest.raises(ConfigError, match="'mistral' cannot be served: layer 0 asks"):
        check_unproved(model, CPU)


def test_state_beside_the_blocks_is_found(load: Any) -> None:
    """A token that sees its neighbour sees, in a batch, another sequence."""
    model = load("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden + hidden.roll(1, dims=1))
    with pytest.raises(ConfigError, match="'llama' cannot be served: its sequences do not come"):
        check_unproved(model, CPU)


def test_a_layer_that_attends_twice_is_found(load: Any) -> None:
    model = load("llama")
    attentions(model)[1].layer_idx = 0
    with pytest.raises(ConfigError, match="'llama' cannot be served: a layer of it attends more"):
        check_unproved(model, CPU)


def test_logits_of_all_tokens_are_found(load: Any) -> None:
    model = load("llama")
    forward = model.forward
    model.forward = lambda *args, logits_to_keep, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ConfigError, match="'llama' cannot be served: it computes the logits of"):
        check_unproved(model, CPU)


def attend_with(change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    """Our attention, given other arguments than the family gave."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        change(kwargs)
        return paged_attention(*args, **kwargs)

    return attend


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma2", lambda kwargs: kwargs.update(scaling=kwargs["scaling"] * 1.1)),
        ("mistral", lambda kwargs: kwargs.update(sliding_window=kwargs["sliding_window"] + 1)),
        ("gemma2", lambda kwargs: kwargs.update(softcap=None)),
        pytest.param("gpt-oss", lambda kwargs: kwargs.update(s_aux=None), marks=needs_stacks),
    ],
    ids=["scale", "window", "softcap", "sink"],
)
def test_attention_that_is_a_little_wrong_is_found(
    load: Any, name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(name)
    check_unproved(model, CPU)
    monkeypatch.setattr(self_check, "paged_attention", attend_with(change))
    with pytest.raises(ConfigError, match="layer 0 asks its attention for what is not done here"):
        check_unproved(model, CPU)


@needs_stacks
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("what", ["experts", "gate and up"])
def test_experts_that_are_swapped_are_found(
    load: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(name)
    check_unproved(model, CPU)
    forward, apply = Experts.forward, Expert.forward

    def swap_experts(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
        return forward(self, hidden, (index + 1) % len(self), weights)

    def swap_parts(self: Any, hidden: Any) -> Any:
        parts = self._modules
        parts["gate_proj"], parts["up_proj"] = parts["up_proj"], parts["gate_proj"]
        out = apply(self, hidden)
        parts["gate_proj"], parts["up_proj"] = parts["up_proj"], parts["gate_proj"]
        return out

    if what == "experts":
        monkeypatch.setattr(Experts, "forward", swap_experts)
    else:
        monkeypatch.setattr(Expert, "forward", swap_parts)
    with pytest.raises(ConfigError, match=r"mlp.experts is off by \d+% from transformers' own"):
        check_unproved(model, CPU)
