"""What `--plan` takes from config.json without transformers, and what it leaves to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from autotp_serving.memory.known_shapes import DEFAULTS, REQUIRED, read_known_config

SIZES = dict.fromkeys(REQUIRED, 64) | {"num_attention_heads": 4}


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """An old config.json lacks what its family had not yet, or has as the class says."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | SIZES))
    known = read_known_config(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    for name in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
        expected = getattr(theirs, name, None)
        if expected is not None:
            assert getattr(known, name) == expected, name
    assert known.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "settings",
    [
        SIZES,
        SIZES | {"model_type": "opt"},
        SIZES | {"model_type": "llama", "auto_map": {"AutoConfig": "own.py"}},
        SIZES | {"model_type": "llama", "hidden_size": "large"},
        {"model_type": "llama"},
        [],
        "no JSON",
    ],
)
def test_what_is_not_known_for_sure_is_left_to_transformers(
    settings: object, tmp_path: Path
) -> None:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "config.json").write_text(text)
    assert read_known_config(tmp_path) is None
    assert read_known_config(tmp_path / "nowhere") is None
