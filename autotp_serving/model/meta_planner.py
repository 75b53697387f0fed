"""`--plan` for any family: transformers builds the model, AutoTP cuts it. In one process, rank 0's.

No weight is read and no device is needed. AutoTP cuts a model without memory, once for each rank,
in a process group that only pretends to have other members.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from autotp_serving.collectives import quiet_deepspeed
from autotp_serving.config import ServingConfig
from autotp_serving.low_bit.plan import MANIFEST_NAME, find_low_bit_plan
from autotp_serving.model.build import build_sharded_model, find_dtype
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.dummy import DummyCheckpoint
from autotp_serving.model.footprint import Footprint, ModelShapes, find_footprint
from autotp_serving.model.shards import describe_shapes
from autotp_serving.ranks import LocalControl


def find_footprints(
    config: ServingConfig, model_config: Any, num_ranks: int, max_model_len: int, on_cpu: bool
) -> list[Footprint]:
    """The footprint of each rank."""
    folder = Path(config.model_path)
    checkpoint = (
        Checkpoint(folder)
        if (folder / MANIFEST_NAME).exists()
        else DummyCheckpoint(folder, model_config, config.trust_remote_code)
    )
    low_bit = find_low_bit_plan(config, checkpoint.low_bit)
    footprints = []
    for control in list_ranks(num_ranks):
        shapes = cut_shapes(config, model_config, control)
        footprints.append(
            find_footprint(shapes, checkpoint, low_bit, config, control, max_model_len, on_cpu)
        )
    return footprints


def list_ranks(num_ranks: int) -> list[LocalControl]:
    """A group on one host, of which only this process is there."""
    return [LocalControl(rank, num_ranks, rank, num_ranks) for rank in range(num_ranks)]


def cut_shapes(config: ServingConfig, model_config: Any, control: LocalControl) -> ModelShapes:
    """The shapes of one rank's model, by AutoTP itself.

    DeepSpeed keeps the groups of its first call, so a process can do this for one number of ranks.
    """
    if control.size > 1:
        _pretend_rank(control)
    model = build_sharded_model(
        model_config,
        find_dtype(config),
        control,
        lambda tensor: tensor,
        config.trust_remote_code,
    )
    return describe_shapes(model)


def _pretend_rank(control: LocalControl) -> None:
    """Be a rank of a group without other members: AutoTP asks only for its number and theirs."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["DS_ACCELERATOR"] = "cpu"
    with quiet_deepspeed():
        import deepspeed
        import deepspeed.comm.comm
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        # Nothing is summed, so nothing need be compiled for it.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        if not dist.is_initialized():
            dist.init_process_group("fake", rank=0, world_size=control.size, store=FakeStore())
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
    deepspeed.comm.comm.cdb.get_rank = lambda group=None: control.rank
