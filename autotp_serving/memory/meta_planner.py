"""`--plan` for any family: transformers builds the model, AutoTP shards it. In rank 0's process.

No weight is read and no device is needed. AutoTP shards a model without memory, once for each rank,
in a process group that only pretends to have other members.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.collectives import quiet_deepspeed
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.model.build import build_sharded_model, find_dtype
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.dummy import DummyCheckpoint
from autotp_serving.model.shapes import ModelShapes
from autotp_serving.model.shards import describe_shapes, report_unused
from autotp_serving.model.stored_tensors import has_weights
from autotp_serving.model.tensor_names import match_tensor_names
from autotp_serving.model.vision_language import hide_vision_tensors
from autotp_serving.pooling import read_pooling


def list_shapes(
    config: ServingConfig, model_config: Any, num_ranks: int
) -> tuple[list[ModelShapes], Checkpoint | DummyCheckpoint]:
    """The shapes of each rank's model, and what tells which tensors are stored converted."""
    folder = Path(config.model_path)
    checkpoint = (
        Checkpoint(folder, config)
        if config.load_format != "dummy" and has_weights(folder, config.allow_pickle)
        else DummyCheckpoint(folder, model_config, config.trust_remote_code)
    )
    hide_vision_tensors(model_config, checkpoint, is_told=False)
    shapes = []
    for group in list_ranks(num_ranks):
        model = shard_model(config, model_config, group)
        match_tensor_names(model, checkpoint)
        report_unused(model, checkpoint, is_reporter=group.rank == 0)
        shapes.append(describe_shapes(model))
    return shapes, checkpoint


def list_ranks(num_ranks: int) -> list[LocalRankGroup]:
    """A group on one host, of which only this process is there."""
    return [LocalRankGroup(rank, num_ranks, rank, num_ranks) for rank in range(num_ranks)]


def shard_model(config: ServingConfig, model_config: Any, group: LocalRankGroup) -> Any:
    """One rank's model on the meta device, sharded by AutoTP itself.

    DeepSpeed keeps the groups of its first call, so a process can do this for one number of ranks.
    """
    if group.size > 1:
        _pretend_rank(group)
    return build_sharded_model(
        model_config,
        find_dtype(config),
        group,
        lambda tensor: tensor,
        config.trust_remote_code,
        read_pooling(config),
        expert_parallel=config.expert_parallel,
    )


def _pretend_rank(group: LocalRankGroup) -> None:
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
            dist.init_process_group("fake", rank=0, world_size=group.size, store=FakeStore())
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
    deepspeed.comm.comm.cdb.get_rank = lambda *_, **__: group.rank
