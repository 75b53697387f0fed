"""How long sequences may be, and the numbers beyond the length of the training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.memory.known_shapes import read_known_config
from autotp_serving.model.lengths import describe_length, find_length, find_max_model_len
from autotp_serving.model.loader import read_model_config
from tests.model.families import COMMON, save_family
from tests.ranks.test_families import IS_TRANSFORMERS_4

needs_transformers_5 = pytest.mark.skipif(
    IS_TRANSFORMERS_4, reason="its settings are written as transformers 5 has them"
)

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [4.0 + number for number in range(16)]}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What config.json says, and the longest sequence that vLLM makes of it.
LIMITS: dict[str, tuple[dict[str, Any], int]] = {
    "llama-2": ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
    "llama-3.1": (
        {"model_type": "llama", "max_position_embeddings": 131072,
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                          "original_max_position_embeddings": 8192, **LLAMA3}},
        131072,
    ),
    "vicuna-16k": (
        {"model_type": "llama", "max_position_embeddings": 4096,
         "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384,
    ),
    "dynamic": (
        {"model_type": "llama", "max_position_embeddings": 4096,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        8192,
    ),
    "qwen2.5 as its card says": (
        {"model_type": "qwen2", "max_position_embeddings": 32768,
         "rope_scaling": {"type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 32768}},
        131072,
    ),
    "qwen3 as its card says": (
        {"model_type": "qwen3", "max_position_embeddings": 40960,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 32768}},
        131072,
    ),
    "yarn without the original length": (
        {"model_type": "qwen2", "max_position_embeddings": 32768,
         "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}},
        65536,
    ),
    "yarn with the length stretched already": (
        {"model_type": "llama", "max_position_embeddings": 163840,
         "rope_scaling": {"rope_type": "yarn", "factor": 40,
                          "original_max_position_embeddings": 4096}},
        163840,
    ),
    "phi-3-128k": (
        {"model_type": "phi3", "max_position_embeddings": 131072,
         "original_max_position_embeddings": 4096, "pad_token_id": 0,
         "rope_scaling": {"type": "longrope", **FACTORS}},
        131072,
    ),
    "gemma-3": (
        {"model_type": "gemma3_text", "max_position_embeddings": 131072, "head_dim": 32,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        131072,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_is_the_one_of_vllm(name: str, tmp_path: Path) -> None:
    settings, expected = LIMITS[name]
    (tmp_path / "config.json").write_text(json.dumps(SIZES | settings))
    configs = [AutoConfig.from_pretrained(tmp_path)]
    known = read_known_config(tmp_path)  # what --plan reads
    assert (known is None) == (name == "gemma-3")
    for config in filter(None, [*configs, known]):
        assert find_length(config).limit == expected
        assert find_max_model_len(ServingConfig("x"), config) == expected
        with pytest.raises(ConfigError, match=f"over the model's own limit of {expected}"):
            find_max_model_len(ServingConfig("x", max_model_len=expected + 1), config)


@pytest.mark.parametrize("factor", ["4", True, 0.5, -1, float("inf"), float("nan"), 1e9, [2]])
def test_a_factor_that_is_none_is_refused(factor: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64}
    settings = SIZES | {"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="factor is"):
        find_length(read_known_config(tmp_path))


@needs_transformers_5
def test_what_is_told_of_lengths() -> None:
    def config(**settings: Any) -> Any:
        return AutoConfig.for_model(**SIZES, **settings)

    plain = config(model_type="llama", max_position_embeddings=64)
    assert describe_length(plain, 64) is None
    phi = config(
        model_type="phi3", max_position_embeddings=256, original_max_position_embeddings=64,
        rope_scaling={"rope_type": "longrope", **FACTORS}, pad_token_id=0,
    )  # fmt: skip
    assert describe_length(phi, 64) is None
    assert "longrope) changes beyond 64 tokens" in str(describe_length(phi, 65))
    parts = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    mixed = config(model_type="llama", max_position_embeddings=256)
    mixed.rope_parameters = parts | {
        "full_attention": parts["full_attention"] | {"original_max_position_embeddings": 64}
    }
    assert find_length(mixed).limit == 64
    assert "the 256 that config.json names are not served" in str(describe_length(mixed, 64))
    with pytest.raises(ConfigError, match=r"limit of 64 .beyond them the rotary embedding of some"):
        find_max_model_len(ServingConfig("x", max_model_len=128), mixed)


TRAINED, LONGEST = 64, 160
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        "llama",
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, **LLAMA3},
    ),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    ),
    "yarn, qwen3": (
        "qwen3",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    ),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    "longrope": ("phi3", {"rope_type": "longrope", **FACTORS}),
}


@needs_transformers_5
@pytest.mark.parametrize("name", SCALED)
def test_numbers_beyond_the_length_of_the_training(name: str, tmp_path: Path) -> None:
    """Each is also another one than without the scaling: a sequence of this length can tell."""
    family, rope = SCALED[name]
    changes: dict[str, Any] = {"rope_scaling": rope, "max_position_embeddings": TRAINED}
    if name == "longrope":
        changes |= {"max_position_embeddings": 4 * TRAINED, "sliding_window": None}
        changes |= {"original_max_position_embeddings": TRAINED}
    if name == "llama3":
        changes["max_position_embeddings"] = 4 * TRAINED
    save_family(family, tmp_path, **changes)
    rng = random.Random(3)
    prompt = [rng.randrange(3, 258) for _ in range(LONGEST - 1)]
    settings = {
        "low_bit": "bf16", "dtype": "float32", "max_model_len": LONGEST,
        "max_num_batched_tokens": 48, "kv_cache_memory": 32 * 2**20,
    }  # fmt: skip
    params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    with LLM(str(tmp_path), **settings) as llm:
        (found,) = llm.generate([prompt], params, show_progress=False)
    logprobs = [one.logprob for one in found.prompt_logprobs]
    # A pass over the whole sequence: that is what fixes the frequencies in transformers.
    ids = torch.tensor([prompt + found.token_ids])
    expected = {}
    for scaling in (rope, None):
        config = AutoConfig.from_pretrained(tmp_path)
        if scaling is None:
            config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config).float()
        with torch.inference_mode():
            rows = model(ids).logits[0, : len(prompt) - 1].log_softmax(-1)
        expected[scaling is rope] = rows.gather(1, ids[0, 1 : len(prompt), None])[:, 0].tolist()
    assert logprobs == pytest.approx(expected[True], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(logprobs, expected[False], strict=True)) > 0.05


@needs_transformers_5
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_up_to_the_length_of_the_training_nothing_changes(name: str, tmp_path: Path) -> None:
    family, rope = SCALED[name]
    changes: dict[str, Any] = {"rope_scaling": rope, "max_position_embeddings": 4 * TRAINED}
    if name == "dynamic":
        changes["max_position_embeddings"] = TRAINED
    else:
        changes |= {"original_max_position_embeddings": TRAINED, "sliding_window": None}
    save_family(family, tmp_path, **changes)
    prompt = list(range(3, TRAINED + 2))
    settings = {"low_bit": "bf16", "dtype": "float32", "kv_cache_memory": 32 * 2**20}
    params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    with LLM(str(tmp_path), max_model_len=TRAINED, **settings) as llm:
        (found,) = llm.generate([prompt], params, show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).float()
    with torch.inference_mode():
        rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert [one.logprob for one in found.prompt_logprobs] == pytest.approx(expected, abs=1e-3)


def test_the_sizes_above_have_heads_of_32() -> None:
    """As many frequencies as the factors of longrope."""
    assert COMMON["head_dim"] // 2 == len(FACTORS["long_factor"])
    assert SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2 == len(FACTORS["long_factor"])


@needs_transformers_5
@pytest.mark.parametrize("is_flat", [True, False])
def test_yarn_in_a_vision_language_model(is_flat: bool, tmp_path: Path) -> None:
    """As Qwen2.5-VL's card has it: among the settings of an image's axes."""
    rope = {"type": "yarn", "mrope_section": [4, 6, 6], "factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    text = SIZES | {"max_position_embeddings": 64, "rope_scaling": rope, "rope_theta": 1e6}
    wrapper = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 1, "hidden_size": 32}}
    settings = wrapper | (text if is_flat else {"text_config": text})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = read_model_config(ServingConfig(str(tmp_path)))
    assert config.model_type == "qwen2" and find_length(config).limit == 256
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.rope_parameters["rope_type"] == "yarn"
