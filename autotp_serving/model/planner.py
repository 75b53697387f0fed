"""`--plan`: what a model will take on each rank, from its config.json. In one process, rank 0's.

No weight is read and no device is needed. AutoTP itself cuts a model without memory, once for each
rank, in a process group that only pretends to have other members.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp_serving.collectives import quiet_deepspeed
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import DeviceError, open_device
from autotp_serving.devices.base import Memory
from autotp_serving.model.build import build_sharded_model, check_heads, find_dtype
from autotp_serving.model.checkpoint import MANIFEST_NAME, Checkpoint
from autotp_serving.model.dummy import DummyCheckpoint
from autotp_serving.model.fit import (
    Room,
    check_host_peaks,
    check_room,
    find_host_peak,
    find_room,
)
from autotp_serving.model.footprint import Footprint, find_footprint
from autotp_serving.model.loader import find_low_bit_plan
from autotp_serving.model.plan_table import format_plan
from autotp_serving.ranks import LocalControl


def print_plan(
    config: ServingConfig, model_config: Any, max_model_len: int, num_ranks: int, local_size: int
) -> None:
    """Print the plan.

    Args:
        max_model_len: most tokens of a prompt and its answer together.
        num_ranks: ranks to plan for.
        local_size: how many of them share a host.

    Raises:
        ConfigError: it does not fit; the plan has been printed then.
    """
    check_heads(model_config, num_ranks)
    kind, memory = find_memory(config)
    on_cpu = kind == "cpu"
    footprints = find_footprints(config, model_config, num_ranks, max_model_len, on_cpu)
    rooms = [
        find_room(footprint, config, memory, on_cpu, local_size, max_model_len)
        for footprint in footprints
    ]
    blocks = min(room.blocks for room in rooms)
    rooms = [replace(room, blocks=blocks) for room in rooms]
    peaks = [find_host_peak(footprint, blocks, on_cpu) for footprint in footprints]
    print(format_plan(config, model_config, footprints, rooms, peaks, kind, memory, max_model_len))
    refuse(config, footprints, rooms, peaks[:local_size], max_model_len)


def refuse(
    config: ServingConfig,
    footprints: list[Footprint],
    rooms: list[Room],
    local_peaks: list[int],
    max_model_len: int,
) -> None:
    """Raise ConfigError for the first thing that does not fit."""
    for rank, (footprint, room) in enumerate(zip(footprints, rooms, strict=True)):
        check_room(footprint, room, config, rank, max_model_len)
    check_host_peaks(local_peaks, config)


def find_memory(config: ServingConfig) -> tuple[str, Memory]:
    """Kind and memory of the device to plan for, which need not be here.

    Raises:
        ConfigError: it is not here, and its memory is not given.
    """
    if config.device_memory is not None:
        # A size that is given means a card, unless the processor is asked for by name.
        kind = "a card" if config.device == "auto" else config.device
        return kind, Memory(config.device_memory, config.device_memory)
    try:
        device = open_device(config.device, 0)
    except DeviceError as error:
        raise ConfigError(
            f"--device {config.device}: {error} To plan without it, give --device-memory."
        ) from error
    return device.kind, device.memory()


def find_footprints(
    config: ServingConfig, model_config: Any, num_ranks: int, max_model_len: int, on_cpu: bool
) -> list[Footprint]:
    """The footprint of each rank."""
    folder = Path(config.model_path)
    if num_ranks > 1:
        _pretend_group(num_ranks)
    footprints = []
    for rank in range(num_ranks):
        control = LocalControl(rank, num_ranks, rank, num_ranks)
        if rank:
            _pretend_rank(rank)
        checkpoint = (
            Checkpoint(folder)
            if (folder / MANIFEST_NAME).exists()
            else DummyCheckpoint(folder, model_config, config.trust_remote_code)
        )
        low_bit = find_low_bit_plan(config, checkpoint)
        model = build_sharded_model(
            model_config,
            find_dtype(config),
            control,
            lambda tensor: tensor,
            config.trust_remote_code,
        )
        footprints.append(
            find_footprint(model, checkpoint, low_bit, config, control, max_model_len, on_cpu)
        )
    return footprints


def _pretend_group(num_ranks: int) -> None:
    """Be rank 0 of a group without other members: AutoTP asks only how many there are."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["DS_ACCELERATOR"] = "cpu"
    with quiet_deepspeed():
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        # Nothing is summed, so nothing need be compiled for it.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())


def _pretend_rank(rank: int) -> None:
    """Be another rank; DeepSpeed keeps the groups of its first call, so only the number changes."""
    import deepspeed.comm.comm

    deepspeed.comm.comm.cdb.get_rank = lambda group=None: rank
