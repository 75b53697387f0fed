"""At start: say what the model will take, refuse what cannot fit, size the KV cache. All ranks.

Each rank checks its own shapes before it reads a weight; rank 0 speaks for all. Once the weights
are in place the same rule, with what was measured, gives the cache what is left.
"""

from __future__ import annotations

import logging
import socket
import sys
from dataclasses import replace
from typing import Any

from torch import nn

from autotp_serving.config import ServingConfig
from autotp_serving.devices import Device
from autotp_serving.devices.base import Memory
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.low_bit.selection import LowBitSelection
from autotp_serving.memory.budget import (
    check_budget,
    check_host_peaks,
    find_budget,
    find_host_peak,
    own_memory,
    show,
)
from autotp_serving.memory.footprint import Footprint, MemorySetup, count_loaded, find_footprint
from autotp_serving.model.kv_cache import KVCacheShape
from autotp_serving.model.shards import describe_shapes

logger = logging.getLogger(__name__)


class StartCheck:
    """The plan of one start, and what comes of it.

    Args:
        num_loading: groups that are yet to take their part of the host's memory, this one included.
    """

    def __init__(
        self,
        config: ServingConfig,
        group: RankGroup,
        device: Device,
        max_model_len: int,
        num_loading: int = 1,
    ) -> None:
        self._config = config
        self._group = group
        self._device = device
        sizes = (group.size, group.local_size * num_loading)
        self._setup = MemorySetup(config, max_model_len, device.is_host, *sizes)
        self._planned: Footprint | None = None
        self._draft_bytes_per_block = 0

    def note_draft(self, model: nn.Module, checkpoint: Any, low_bit: LowBitSelection) -> None:
        """Take note of a draft model that loads before the model: its cache has as many blocks."""
        footprint = self._find_footprint(model, checkpoint, low_bit)
        self._draft_bytes_per_block = footprint.kv_bytes_per_block

    def _find_footprint(
        self, model: nn.Module, checkpoint: Any, low_bit: LowBitSelection
    ) -> Footprint:
        shapes = describe_shapes(model)
        return find_footprint(shapes, checkpoint, low_bit, self._setup, self._group.rank)

    def check_plan(self, model: nn.Module, checkpoint: Any, low_bit: LowBitSelection) -> None:
        """Log what the ranks will take together.

        Args:
            model: sharded, on the meta device.

        Raises:
            ConfigError: it cannot fit; with the numbers and the flag to change.
        """
        footprint = self._find_footprint(model, checkpoint, low_bit)
        num_bytes = footprint.kv_bytes_per_block + self._draft_bytes_per_block
        footprint = self._planned = replace(footprint, kv_bytes_per_block=num_bytes)
        blocks = self._agree_on_blocks(footprint, self._device.memory())
        host_peak = find_host_peak(footprint, blocks, self._setup, own_memory())
        here = socket.gethostname()
        peaks = self._group.all_gather((here, host_peak))
        local = [peak for host, peak in peaks if host == here]
        check_host_peaks(local * self._config.data_parallel_size, self._config)
        cache = blocks * footprint.kv_bytes_per_block
        self._log("Planned", footprint.weight_bytes, cache, footprint.activation_bytes, host_peak)

    def size_cache(
        self, shape: KVCacheShape, step_bytes: int | None, adapter_bytes: int = 0
    ) -> int:
        """Number of KV blocks that every rank can hold, now that its weights are in place.

        With --kv-cache-memory, as many as fit in it. Otherwise what is left of the device after
        weights and activations; on CPU no more than the running sequences can fill, because host
        memory has other uses.

        Args:
            step_bytes: most that a step's activations were seen to take; None: as planned.
            adapter_bytes: to be left for adapters.

        Raises:
            ConfigError: not even one sequence of the full length fits.
        """
        assert self._planned is not None, "check_plan comes first"
        bytes_per_block = shape.bytes_per_block + self._draft_bytes_per_block
        placed = replace(self._planned, weights={}, kv_bytes_per_block=bytes_per_block)
        if step_bytes is not None:
            placed = replace(placed, activation_bytes=step_bytes)
        placed = replace(placed, activation_bytes=placed.activation_bytes + adapter_bytes)
        memory = self._device.memory()
        if self._config.kv_cache_memory is not None:  # was weighed before loading
            memory = Memory(sys.maxsize, sys.maxsize)
        blocks = self._agree_on_blocks(placed, memory)
        if self._group.rank == 0:
            logger.info(
                "KV cache: %d blocks of %d tokens in %s, %d MiB per rank",
                blocks,
                shape.block_size,
                str(shape.stored_dtype).removeprefix("torch."),
                blocks * bytes_per_block >> 20,
            )
        return blocks

    def _agree_on_blocks(self, footprint: Footprint, memory: Memory) -> int:
        """KV blocks that every rank can hold; all ranks must call it."""
        budget = find_budget(footprint, self._setup, memory)
        check_budget(footprint, budget, self._setup, self._group.rank)
        return min(self._group.all_gather(budget.blocks))

    def report_measured(self, model: nn.Module, cache_bytes: int) -> None:
        """Log the same sizes as they came out; the host's peak so far, before the first request."""
        peak = CpuDevice(self._group.local_rank).peak_memory()
        self._log("Measured", count_loaded(model), cache_bytes, None, peak)

    def _log(self, word: str, weights: int, cache: int, step: int | None, host: int) -> None:
        ranks = self._group.all_gather((weights, cache, step, host))
        if self._group.rank != 0:
            return
        weights, cache, host = (sum(rank[part] for rank in ranks) for part in (0, 1, 3))
        activations = "" if step is None else f", a step's activations {show(step)} a rank"
        logger.info(
            "%s, all ranks together: weights %s, KV cache %s, host memory at its peak %s%s",
            word,
            show(weights),
            show(cache),
            show(host),
            activations,
        )
