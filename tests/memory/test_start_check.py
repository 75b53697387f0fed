"""The start's check and the cache's size come of the plan's rule, with what was measured."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices.base import Memory
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.low_bit.selection import find_low_bit_selection
from autotp_serving.memory.budget import find_budget
from autotp_serving.memory.footprint import Footprint, MemorySetup
from autotp_serving.memory.planner import find_footprints
from autotp_serving.memory.start_check import StartCheck
from autotp_serving.model.build import build_sharded_model
from autotp_serving.model.kv_cache import KVCacheShape
from autotp_serving.model.loader import read_model_config
from tests.model.checkpoints import save_tiny_llama

MIB = 2**20
SHAPE = KVCacheShape(((4, 32, 32),) * 3, 16, torch.bfloat16)
MAX_MODEL_LEN = 1024


class FakeDevice:
    """A device whose memory is set by the test."""

    def __init__(self, is_host: bool, total: int, free: int) -> None:
        self.is_host = is_host
        self.size = Memory(total, free)

    def memory(self) -> Memory:
        return self.size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model on the meta device, its settings and its footprint on CPU."""
    folder: Path = save_tiny_llama(tmp_path_factory.mktemp("model"))
    config = ServingConfig(model_path=str(folder), low_bit="bf16", max_num_batched_tokens=256)
    model_config = read_model_config(config)
    empty = build_sharded_model(
        model_config, torch.bfloat16, LocalRankGroup(), lambda tensor: tensor, False
    )
    (planned,) = find_footprints(MemorySetup(config, MAX_MODEL_LEN, True), model_config)
    return SimpleNamespace(config=config, empty=empty, planned=planned)


def start(model: Any, device: FakeDevice, **changes: Any) -> StartCheck:
    """A check that has planned."""
    config = replace(model.config, **changes)
    check = StartCheck(config, LocalRankGroup(), device, MAX_MODEL_LEN)
    check.check_plan(model.empty, None, find_low_bit_selection(config, None))
    return check


def place(device: FakeDevice, footprint: Footprint) -> None:
    """Take the weights off what is free."""
    device.size = replace(device.size, free=device.size.free - footprint.weight_bytes)


def test_on_cpu_the_cache_has_the_blocks_of_the_plan(model: Any) -> None:
    for free in (60 * MIB, 4000 * MIB):
        device = FakeDevice(True, 4000 * MIB, free)
        check = start(model, device, gpu_memory_utilization=1.0)
        setup = MemorySetup(
            replace(model.config, gpu_memory_utilization=1.0), MAX_MODEL_LEN, on_cpu=True
        )
        planned = find_budget(model.planned, setup, device.memory()).blocks
        place(device, model.planned)
        assert check.size_cache(SHAPE, None) == planned
    assert planned == model.config.max_num_seqs * setup.blocks_per_sequence


def test_on_a_card_what_a_step_was_seen_to_take_counts(model: Any) -> None:
    device = FakeDevice(False, 200 * MIB, 200 * MIB)
    check = start(model, device, gpu_memory_utilization=0.75)
    place(device, model.planned)
    usable = 150 * MIB - model.planned.weight_bytes
    for step_bytes in (0, 50 * MIB):
        expected = (usable - step_bytes) // SHAPE.bytes_per_block
        assert check.size_cache(SHAPE, step_bytes) == expected
    with pytest.raises(ConfigError, match=r"rank 0 needs .* \(beside its weights, a step's act"):
        check.size_cache(SHAPE, 149 * MIB)


@pytest.mark.parametrize("is_host", [True, False])
def test_a_size_that_is_given_is_kept_to(model: Any, is_host: bool) -> None:
    """Whatever else has come into memory meanwhile."""
    device = FakeDevice(is_host, 200 * MIB, 200 * MIB)
    check = start(model, device, kv_cache_memory=30 * MIB)
    device.size = Memory(200 * MIB, MIB)
    assert check.size_cache(SHAPE, None) == 30 * MIB // SHAPE.bytes_per_block
    large = KVCacheShape(((64, 128, 128),) * 3, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory .* holds 320 tokens"):
        check.size_cache(large, None)


def test_what_cannot_fit_is_refused_before_it_is_read(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"rank 0 needs .* \(weights .* raise --gpu-memory-util"):
        start(model, FakeDevice(False, 8 * MIB, 8 * MIB))
    with pytest.raises(ConfigError, match=r"would take .* over --max-host-ram"):
        start(model, FakeDevice(True, 4000 * MIB, 4000 * MIB), max_host_ram=MIB)


def test_both_are_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    device = FakeDevice(True, 4000 * MIB, 4000 * MIB)
    check = start(model, device, kv_cache_memory=30 * MIB)
    check.size_cache(SHAPE, None)
    planned, cache = (record.getMessage() for record in caplog.records)
    assert planned.startswith("Planned, all ranks together: weights ")
    assert cache == "KV cache: 1280 blocks of 16 tokens in bfloat16, 30 MiB per rank"
