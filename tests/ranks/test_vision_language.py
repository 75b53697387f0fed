"""Vision-language checkpoints as text models: transformers' own tokens, at one and two ranks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from autotp_serving.config import ServingConfig
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.loader import read_model_config
from autotp_serving.model.vision_language import hide_vision_tensors
from tests.model.vision_language import (
    LAYOUTS,
    generate_with_transformers,
    save_vision_language,
)
from tests.ranks.launch import run_jobs, run_ranks
from tests.ranks.test_families import MAX_TOKENS, SETTINGS, make_prompts

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        int(transformers.__version__.split(".")[0]) < 5, reason="layouts as transformers 5 saves"
    ),
]

SAVED = ("gemma3", "mistral3, untold", "qwen2.5-vl, flat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {name: save_vision_language(name, root / name) for name in LAYOUTS}


@pytest.fixture(scope="module")
def saved(folders: dict[str, Path]) -> dict[str, Path]:
    """The same, converted by two ranks."""
    found = {name: folders[name].with_name(f"{name} saved") for name in SAVED}
    paths = [path for name in SAVED for path in (folders[name], found[name])]
    run_ranks(2, "tests/ranks/save_program.py", "sym_int8", *paths)
    return found


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, Path], saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], Any]:
    """By layout, weights and number of ranks."""
    kinds = [(name, "bf16", folders[name]) for name in folders]
    kinds += [(name, "sym_int8", folders[name]) for name in SAVED]
    kinds += [(name, "saved", saved[name]) for name in SAVED]
    jobs = [
        {
            "model": str(folder),
            "prompts": make_prompts()[:: 1 if low_bit == "bf16" else 3],
            "max_tokens": MAX_TOKENS,
            "settings": SETTINGS | ({} if low_bit == "saved" else {"low_bit": low_bit}),
        }
        for _, low_bit, folder in kinds
    ]
    found = {}
    for num_ranks in (1, 2):
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {
            (name, low_bit, num_ranks): one
            for (name, low_bit, _), one in zip(kinds, results, strict=True)
        }
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_equal_those_of_transformers(
    name: str, folders: dict[str, Path], answers: dict[tuple[str, str, int], Any]
) -> None:
    expected = generate_with_transformers(folders[name], make_prompts(), MAX_TOKENS)
    assert len({token for answer in expected for token in answer}) > 12, "answers that prove little"
    assert answers[name, "bf16", 1] == expected
    assert answers[name, "bf16", 2] == expected


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_folder_gives_the_tokens_of_the_checkpoint(
    name: str, saved: dict[str, Path], answers: dict[tuple[str, str, int], Any]
) -> None:
    whole = answers[name, "sym_int8", 1]
    assert isinstance(whole, list), whole
    assert answers[name, "sym_int8", 2] == whole
    assert answers[name, "saved", 1] == whole
    assert answers[name, "saved", 2] == whole
    names = Checkpoint(saved[name]).names()
    assert not any("vision" in one or "visual" in one for one in names)


@pytest.mark.parametrize("name", SAVED)
def test_plan(name: str, folders: dict[str, Path]) -> None:
    arguments = ["--plan", "--device-memory", "1GiB", "--device", "cpu", "--low-bit", "sym_int4"]
    arguments += ["--tensor-parallel-size", "2"]
    written = run_ranks(1, "serving.py", "--repo-id-or-model-path", folders[name], *arguments)
    assert "KV cache" in written, written


@pytest.mark.parametrize("name", LAYOUTS)
def test_vision_tensors_are_told_of_once(
    name: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model_config = read_model_config(ServingConfig(str(folders[name])))
    checkpoint = Checkpoint(folders[name])
    before = len(checkpoint.names())
    with caplog.at_level(logging.INFO, "autotp_serving"):
        hide_vision_tensors(model_config, checkpoint, is_told=False)
        assert not caplog.messages
        hidden = before - len(checkpoint.names())
        hide_vision_tensors(model_config, Checkpoint(folders[name]), is_told=True)
    (line,) = caplog.messages
    wrapper = json.loads((folders[name] / "config.json").read_text())["model_type"]
    assert hidden > 5 and f"{hidden} tensors of its vision part" in line and wrapper in line
    assert all("layers" in one or "norm" in one or "embed_tokens" in one or "lm_head" in one
               for one in checkpoint.names())  # fmt: skip
