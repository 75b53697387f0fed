"""The plan's bytes are those that are loaded; dummy weights do not depend on the ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices.base import Memory
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.memory.budget import check_budget, check_host_peaks, find_budget, show
from autotp_serving.memory.draft_plan import find_draft_footprints
from autotp_serving.memory.footprint import Footprint, MemorySetup, count_loaded
from autotp_serving.memory.planner import find_footprints, find_memory, find_plan
from autotp_serving.model.dummy import DummyCheckpoint
from autotp_serving.model.loader import load_model, read_model_config
from tests.model.checkpoints import save_tiny_llama

GIB = 2**30
FOOTPRINT = Footprint({("MLP", "bf16"): 6 * GIB}, 2**20, GIB, 7 * GIB)


def load(config: ServingConfig) -> torch.nn.Module:
    """The model at one rank, on CPU."""
    return load_model(
        config,
        read_model_config(config),
        LocalRankGroup(),
        torch.device("cpu"),
        lambda tensor: tensor,
    )


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4", "asym_int5", "fp6"])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_weights_are_those_loaded(tmp_path: Path, low_bit: str, tied: bool) -> None:
    folder = save_tiny_llama(tmp_path, tie_word_embeddings=tied)
    config = ServingConfig(model_path=str(folder), low_bit=low_bit)
    (planned,) = find_footprints(MemorySetup(config, 2048, True), read_model_config(config))
    assert planned.weight_bytes == count_loaded(load(config))
    assert planned.kv_bytes_per_block == 3 * 2 * 4 * 32 * 2 * 16  # layers, k and v, heads, ...
    config = replace(config, kv_cache_dtype="int8")
    (planned,) = find_footprints(MemorySetup(config, 2048, True), read_model_config(config))
    assert planned.kv_bytes_per_block == 3 * 2 * 4 * (32 + 4) * 16


def test_a_draft_model_counts(tmp_path: Path) -> None:
    folder, other = save_tiny_llama(tmp_path / "a"), save_tiny_llama(tmp_path / "b")
    config = ServingConfig(model_path=str(folder), draft_model=str(other), low_bit="sym_int4")
    setup, model_config = MemorySetup(config, 2048, True), read_model_config(config)
    (alone,) = find_footprints(setup, model_config)
    (both,) = find_plan(setup, model_config, None, Memory(GIB, GIB)).footprints
    assert both.weight_bytes == 2 * alone.weight_bytes
    assert both.kv_bytes_per_block == 2 * alone.kv_bytes_per_block
    assert both.load_bytes == alone.weight_bytes + alone.load_bytes
    for draft, reason in (("nowhere", "nowhere"), (str(other), "add --max-model-len")):
        unlike = replace(config, draft_model=draft)
        with pytest.raises(ConfigError, match=f"--draft-model {draft}: .*{reason}"):
            find_draft_footprints(MemorySetup(unlike, 10**6, True))


def test_room_is_what_weights_and_activations_leave() -> None:
    config = ServingConfig(model_path="x", gpu_memory_utilization=0.5, block_size=16)
    setup = MemorySetup(config, 1600, False, 2, 2)
    budget = find_budget(FOOTPRINT, setup, Memory(32 * GIB, 30 * GIB))
    assert (budget.usable, budget.blocks, setup.blocks_per_sequence) == (14 * GIB, 7 * 1024, 100)
    on_cpu = find_budget(FOOTPRINT, replace(setup, on_cpu=True), Memory(32 * GIB, 32 * GIB))
    assert (on_cpu.usable, on_cpu.blocks) == (8 * GIB, 800)
    sized = replace(setup, on_cpu=True, config=replace(config, kv_cache_memory=GIB))
    on_cpu = find_budget(FOOTPRINT, sized, Memory(32 * GIB, 20 * GIB))
    assert (on_cpu.usable, on_cpu.blocks) == (10 * GIB, 1024)


@pytest.mark.parametrize(
    ("total", "cure"),
    [(7, "start more ranks"), (8, "set --max-model-len to at most 3264, or raise --gpu-mem")],
)
def test_what_cannot_fit_is_refused_with_numbers_and_cure(total: int, cure: str) -> None:
    config = ServingConfig(model_path="x", gpu_memory_utilization=0.9)
    setup = MemorySetup(config, 8192, False)
    budget = find_budget(FOOTPRINT, setup, Memory(total * GIB, total * GIB))
    with pytest.raises(ConfigError, match=cure) as error:
        check_budget(FOOTPRINT, budget, setup, 1)
    assert "rank 1 needs 7.50 GiB (weights 6.00 GiB, " in str(error.value)
    fitting = find_budget(FOOTPRINT, setup, Memory(9 * GIB, 9 * GIB))
    check_budget(FOOTPRINT, fitting, setup, 1)


def test_host_memory_is_that_of_all_ranks() -> None:
    config = ServingConfig(model_path="x", max_host_ram=3 * GIB)
    check_host_peaks([GIB, GIB], config)
    with pytest.raises(ConfigError, match=r"\(2\) would take 4.00 GiB .* --max-host-ram 3.00"):
        check_host_peaks([GIB, 3 * GIB], config)


def test_a_card_that_is_not_here_is_planned_for() -> None:
    config = ServingConfig(model_path="x", plan=True, device_memory=16 * GIB)
    assert find_memory(config) == ("a card", Memory(16 * GIB, 16 * GIB))


def test_sizes_are_shown_in_a_unit_that_fits() -> None:
    assert [show(size) for size in (5, 2048, 3 * 2**20, 5 * GIB)] == [
        "5 B", "2.0 KiB", "3.0 MiB", "5.00 GiB",
    ]  # fmt: skip


@pytest.fixture
def dummy(tmp_path: Path) -> Any:
    """Random weights for a model of which only config.json is there, and its settings."""
    folder = save_tiny_llama(tmp_path)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = ServingConfig(model_path=str(folder), load_format="dummy")
    return SimpleNamespace(
        config=config, checkpoint=DummyCheckpoint(folder, read_model_config(config), False)
    )


def test_dummy_slices_are_parts_of_one_tensor(dummy: Any) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rows, cols = dummy.checkpoint.shape(name)
    whole = dummy.checkpoint.read(name, ((0, rows), (0, cols)))
    assert 0.015 < whole.float().std() < 0.025
    part = dummy.checkpoint.read(name, ((70, 201), (64, 320)))
    assert torch.equal(part, whole[70:201, 64:320])
    other = dummy.checkpoint.read(name.replace("1", "2"), ((0, rows), (0, cols)))
    assert not torch.equal(whole, other)


def test_dummy_weights_load_from_config_alone(dummy: Any) -> None:
    model = load(dummy.config)
    assert bool((model.model.norm.weight == 1).all())
    assert model.lm_head.low_bit is not None
