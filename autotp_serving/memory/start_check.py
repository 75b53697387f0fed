"""At start: say what the model will take, refuse what cannot fit, then say what it took. All ranks.

Each rank checks its own shapes before it reads a weight; rank 0 speaks for all.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from autotp_serving.config import ServingConfig
from autotp_serving.devices import Device
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.low_bit.selection import LowBitSelection
from autotp_serving.memory.budget import (
    check_budget,
    check_host,
    find_budget,
    find_host_peak,
    own_memory,
    show,
)
from autotp_serving.memory.footprint import count_loaded, find_footprint
from autotp_serving.model.shards import describe_shapes

logger = logging.getLogger(__name__)


class StartCheck:
    """The plan of one start, and the comparison with what came of it."""

    def __init__(
        self, config: ServingConfig, group: RankGroup, device: Device, max_model_len: int
    ) -> None:
        self._config = config
        self._group = group
        self._device = device
        self._max_model_len = max_model_len

    def check_plan(self, model: nn.Module, checkpoint: Any, low_bit: LowBitSelection) -> None:
        """Log what the ranks will take together.

        Args:
            model: sharded, on the meta device.

        Raises:
            ConfigError: it cannot fit; with the numbers and the flag to change.
        """
        on_cpu = self._device.is_host
        footprint = find_footprint(
            describe_shapes(model),
            checkpoint,
            low_bit,
            self._config,
            self._group,
            self._max_model_len,
            on_cpu,
        )
        budget = find_budget(
            footprint,
            self._config,
            self._device.memory(),
            on_cpu,
            self._group.local_size,
            self._max_model_len,
        )
        check_budget(footprint, budget, self._config, self._group.rank, self._max_model_len)
        blocks = min(self._group.all_gather(budget.blocks))
        host_peak = find_host_peak(footprint, blocks, on_cpu, own_memory())
        check_host(host_peak, self._config, self._group)
        cache = blocks * footprint.kv_bytes_per_block
        self._log("Planned", footprint.weight_bytes, cache, footprint.activation_bytes, host_peak)

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
