"""From a config to a model that is ready to run: join the ranks, load, size the cache. Every rank.

Shared by the server and by offline use; nothing here knows of HTTP or of scheduling.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import DeviceError, open_device
from autotp_serving.distributed.agreement import check_agreement
from autotp_serving.distributed.channel import StepChannel
from autotp_serving.distributed.collectives import broadcast_tokens, join_collectives
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.distributed.placement import (
    count_idle_cpus,
    find_placement,
    pin_to_cpus,
    read_topology,
)
from autotp_serving.distributed.store import close_doors
from autotp_serving.memory.probe import probe_model
from autotp_serving.memory.start_check import StartCheck
from autotp_serving.model.adapters import AdapterSlots
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.families import PROVED, check_heads
from autotp_serving.model.forward import PlainForward
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.lengths import describe_length, find_max_model_len, fix_rotary
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.shards import Shard
from autotp_serving.model.state_layers import allocate_states, list_state_layers
from autotp_serving.pooling import read_pooling
from autotp_serving.step_times import StepTimes
from autotp_serving.worker.backend import PassSetup, choose_backend
from autotp_serving.worker.block_file import open_block_file
from autotp_serving.worker.draft_model import load_draft_model
from autotp_serving.worker.runner import LeadRunner, ModelRunner
from autotp_serving.worker.step_logits import LogitsGatherer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """One rank, loaded and ready.

    Attributes:
        model: this rank's shard, in transformers' modules.
        max_model_len: most tokens of a prompt and its completion together.
        vocab_size: tokens that the model has an embedding and logits for.
        device_kind: where it is: "cpu", "cuda" or "xpu".
        lead: what the engine drives; on rank 0 only.
    """

    model: nn.Module
    cache: KVCache
    runner: ModelRunner
    lead: LeadRunner | None
    channel: StepChannel
    max_model_len: int
    vocab_size: int
    device_kind: str


def bind_to_placement(group: RankGroup) -> None:
    """Go to this rank's cores before it loads, with a thread for each; all ranks must call it.

    OMP_NUM_THREADS, where it is set, has the last word on the threads. A rank alone, as a script
    beside other work is one, leaves the CPUs that are busy to others.
    """
    if not hasattr(os, "sched_getaffinity"):  # only Linux has it
        return
    own = frozenset(os.sched_getaffinity(0))
    here = socket.gethostname()
    ranks = group.all_gather((here, group.rank, own))
    local = sorted((rank, mask) for host, rank, mask in ranks if host == here)
    masks = [mask for _, mask in local]
    index = [rank for rank, _ in local].index(group.rank)
    placement = find_placement(read_topology(own), masks, index)
    if placement.cpus is not None:
        pin_to_cpus(placement.cpus)
    if "OMP_NUM_THREADS" not in os.environ:
        num_threads = placement.threads
        idle = count_idle_cpus() if len(ranks) == 1 else None
        if idle is not None and idle < num_threads:
            num_threads = max(1, idle)
            logger.info("Other programs keep CPUs busy: OMP_NUM_THREADS sets more threads")
        torch.set_num_threads(num_threads)
    threads = torch.get_num_threads()
    logger.info("Rank %d %s, %d thread(s)", group.rank, placement.describe(), threads)


def start_worker(config: ServingConfig, group: RankGroup, num_loading: int = 1) -> Worker:
    """Load this rank's part of the model; all ranks must call it.

    Args:
        num_loading: groups on this host that are yet to load, this one included.

    Raises:
        ConfigError: in one line, with the cure.
        GroupFailure: another rank could not start.
    """
    model_config = read_model_config(config)
    check_heads(model_config, group.size)
    max_model_len = find_max_model_len(config, model_config)
    try:
        device = open_device(config.device, group.local_rank)
    except DeviceError as error:
        raise ConfigError(f"--device {config.device}: {error}") from error
    if group.size > 1 and not device.is_host and config.speculative_tokens is None:
        config = replace(config, speculative_tokens=0)  # not tried yet on several cards
    times = StepTimes()
    all_reduce = join_collectives(group, device.kind, device.backend, times, is_host=device.is_host)
    if device.is_host:
        bind_to_placement(group)
    check_agreement(config, group)
    checker = StartCheck(config, group, device, max_model_len, num_loading)
    draft = None
    if config.draft_model is not None:
        if not device.is_host:
            raise ConfigError("--draft-model is for CPUs: leave it out")
        draft = load_draft_model(
            config, group, device, all_reduce, max_model_len, checker.note_draft
        )
    shards: dict[str, Shard] = {}
    model = load_model(
        *(config, model_config, group, device.torch_device, all_reduce, checker.check_plan),
        keep_shards=shards.update,
    )
    fix_rotary(model, max_model_len)
    note = describe_length(model_config, max_model_len)
    if note and group.rank == 0:
        logger.info(note)
    shape, step_bytes = probe_model(model, config, device, max_model_len)
    adapters = None
    if config.uses_adapters:
        adapters = AdapterSlots(model, shards, config, device.torch_device)
    num_blocks = checker.size_cache(shape, step_bytes, adapters.num_bytes if adapters else 0)
    backend = choose_backend(device.torch_device)
    pooling = read_pooling(config)
    is_causal = pooling is None or pooling.is_causal
    kernels = backend.cache(shape, is_causal=is_causal)
    cache = KVCache(shape, num_blocks, device.torch_device, kernels)
    states = list_state_layers(model)
    if states and config.kv_offload_dir is not None:
        raise ConfigError(
            "--kv-offload-dir: this model's layers keep states beside the KV blocks, which are not "
            "stored: leave it out"
        )
    if states:
        rows = config.num_rows + config.num_kept_states
        allocate_states(model, rows, device.torch_device, backend.recurrence())
    if states and group.rank == 0:
        logger.info(
            "%d layers keep a state beside the KV blocks, %d KiB a sequence on each rank, and as "
            "much for each of %d beginnings of prompts",
            len(states),
            sum(layer.bytes_per_row for layer in states) >> 10,
            config.num_kept_states,
        )
    checker.report_measured(model, num_blocks * shape.bytes_per_block)
    state = BatchState(
        config.max_num_seqs,
        -(-max_model_len // config.block_size),
        config.block_size,
        device.torch_device,
    )
    setup = PassSetup(config, max_model_len, state, all_reduce, group, is_causal)
    forward = backend.layer(model, cache, setup)
    # A refused draft leaves nothing behind in blocks; in states it would.
    can_draft = forward.can_draft and config.num_drafts > 0
    if adapters is not None:
        forward = adapters.use(forward, PlainForward(model, cache))
    draft_model = draft.open(num_blocks, backend, setup) if draft else None
    broadcast = None
    if device.max_in_flight > 1:
        broadcast = broadcast_tokens if group.size > 1 else lambda tokens: None
    if (config.speculative_tokens or draft_model) and not can_draft:
        flag = "--draft-model" if draft_model else "--speculative-tokens"
        raise ConfigError(
            f"{flag}: text would depend on drafts in this model, weight format or "
            "device; leave it out"
        )
    head = model.get_output_embeddings()
    by_candidates = device.is_host and model.config.model_type in PROVED and not config.pools
    gatherer = LogitsGatherer(head, by_candidates=by_candidates)
    block_file = open_block_file(config, group, cache, max_model_len)
    stored_blocks = block_file.agree(group) if block_file is not None else []
    runner = ModelRunner(
        *(forward, gatherer, state, times, broadcast, states, block_file, all_reduce, adapters),
        draft_model=draft_model,
    )
    channel = StepChannel(group)
    close_doors(group, is_host=device.is_host)
    lead = None
    if group.rank == 0:
        sampler = backend.sampler(device.fetch)
        lead = LeadRunner(
            runner,
            cache,
            channel,
            group.size,
            sampler,
            device.max_in_flight,
            can_draft=can_draft,
            vocab_size=head.vocab_size,
            stored_blocks=stored_blocks,
        )
    if config.profile is not None:
        from autotp_serving.worker.profiler import StepProfiler

        folder = Path(config.profile)
        StepProfiler(folder, group.rank, device, runner, lead).attach(model)
    return Worker(model, cache, runner, lead, channel, max_model_len, head.vocab_size, device.kind)
