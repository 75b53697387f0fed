"""What a config.json may ask for, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from autotp_serving.config import ConfigError
from autotp_serving.model import families
from autotp_serving.model.families import adapt_rope, check_family, refuse_by_name

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families.metadata, "version", lambda name: "4.53.3")


@pytest.mark.usefixtures("old_transformers")
@pytest.mark.parametrize(("scaling", "expected"), [({"rope_type": "default"}, None), (LLAMA3,) * 2])
def test_an_older_transformers_finds_the_rotary_settings(scaling: Any, expected: Any) -> None:
    config = SimpleNamespace(rope_parameters=scaling | {"rope_theta": 5e5}, rope_theta=1e4)
    adapt_rope(config)
    assert (config.rope_theta, config.rope_scaling) == (5e5, expected)


@pytest.mark.usefixtures("old_transformers")
@pytest.mark.parametrize(
    "written",
    [
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_type": "default"},
    ],
)
def test_rotary_settings_without_a_place_there_are_refused(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"'rope_parameters', .* 4.53.3 has no place"):
        adapt_rope(SimpleNamespace(rope_parameters=written))


def test_a_newer_transformers_reads_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families.metadata, "version", lambda name: "5.23.0")
    config = SimpleNamespace(rope_parameters={"full_attention": {}})
    adapt_rope(config)
    assert vars(config) == {"rope_parameters": {"full_attention": {}}}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("t5", "an encoder reads its prompts"),
        ("mamba", "no attention heads"),
        ("rwkv", "no attention heads"),
    ],
)
def test_what_is_no_decoder_is_told_by_its_config(family: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"the family '{family}' cannot be served: .*{reason}"):
        check_family(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("bert", {}, "it is an encoder"),
        ("olmo2", {"is_causal": False}, "proved families only"),
        ("mistral", {"is_causal": False, "sliding_window": 8}, "within a window"),
    ],
)
def test_what_cannot_embed_is_refused(family: str, settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_family(AutoConfig.for_model(family, **settings), pools=True)
    if settings:
        with pytest.raises(ConfigError, match="cannot go on with a text"):
            check_family(AutoConfig.for_model(family, **settings))


def test_what_breaks_in_a_family_s_own_code_names_it() -> None:
    with (
        pytest.raises(ConfigError, match=r"'olmo2' cannot be served \(RuntimeError: no kernel\)"),
        refuse_by_name(SimpleNamespace(model_type="olmo2")),
    ):
        raise RuntimeError("no kernel\nfor this")


def test_what_breaks_in_a_proved_family_is_a_fault_of_ours() -> None:
    with pytest.raises(RuntimeError), refuse_by_name(SimpleNamespace(model_type="llama")):
        raise RuntimeError("no kernel")
