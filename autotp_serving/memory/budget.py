"""Whether a model fits: device memory, host memory, and how much KV cache is left. Every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices.base import Memory
from autotp_serving.memory.footprint import Footprint, MemorySetup

SERVER_BYTES = 64 * 2**20
"""What a rank's process grows by, apart from the model, once it has been planned: HTTP, tokenizer,
collectives, compiled kernels."""

IMPORTED_BYTES = 380 * 2**20
"""What a rank's process holds before it loads, measured on CPU: torch, transformers, DeepSpeed."""


@dataclass(frozen=True)
class MemoryBudget:
    """One rank's part of a device, and of it what the KV cache may take.

    Attributes:
        usable: bytes that weights, activations and cache may take together.
        blocks: KV blocks that are left to this rank; negative when the rest does not fit.
    """

    usable: int
    blocks: int


def find_budget(footprint: Footprint, setup: MemorySetup, memory: Memory) -> MemoryBudget:
    """Divide a device's memory: for `--plan`, before weights are read, and once they are placed.

    Args:
        footprint: of what is not yet in `memory`.
        memory: as it is now.

    Raises:
        ConfigError: a cache is asked for that no such device could hold.
    """
    config = setup.config
    num_sharing = setup.local_size if setup.on_cpu else 1
    if (config.kv_cache_memory or 0) * num_sharing > memory.total:
        raise ConfigError(
            f"--kv-cache-memory {show(config.kv_cache_memory)} on each of {num_sharing} rank(s) is "
            f"more than the {show(memory.total)} of memory that they share: lower it"
        )
    usable = int(memory.free - (1.0 - config.gpu_memory_utilization) * memory.total)
    if setup.on_cpu:
        # A share of host memory is kept free of an automatic cache only.
        usable = (usable if config.kv_cache_memory is None else memory.free) // num_sharing
    left = usable - footprint.fixed_bytes
    blocks = left // footprint.kv_bytes_per_block
    if config.kv_cache_memory is not None:
        blocks = min(blocks, config.kv_cache_memory // footprint.kv_bytes_per_block)
    elif setup.on_cpu:
        blocks = min(blocks, config.max_num_seqs * setup.blocks_per_sequence)
    return MemoryBudget(usable, blocks)


def check_budget(footprint: Footprint, budget: MemoryBudget, setup: MemorySetup, rank: int) -> None:
    """Refuse what cannot hold its weights and one sequence.

    Raises:
        ConfigError: with the numbers and the flags to change.
    """
    config, max_model_len = setup.config, setup.max_model_len
    kv_bytes = setup.blocks_per_sequence * footprint.kv_bytes_per_block
    given = config.kv_cache_memory
    if given is not None and given < kv_bytes:
        tokens = given // footprint.kv_bytes_per_block * config.block_size
        unit = "" if given >= 2**20 else ", or was a unit meant? A number without one is bytes"
        raise ConfigError(
            f"--kv-cache-memory {show(given)} holds {tokens} tokens on rank {rank}, but "
            f"--max-model-len is {max_model_len}, which takes {show(kv_bytes)}: "
            f"raise it, or lower --max-model-len{unit}"
        )
    needed = footprint.fixed_bytes + kv_bytes
    if needed <= budget.usable:
        return
    spare = budget.usable - footprint.fixed_bytes
    tokens = spare // footprint.kv_bytes_per_block * config.block_size
    if tokens > 0:
        cure = f"set --max-model-len to at most {tokens}, or "
    else:
        cure = "start more ranks, choose a smaller --low-bit, lower --max-num-batched-tokens, or "
    states = ""
    if footprint.state_bytes:
        states = (
            f"states of {config.max_num_seqs} sequences and {config.num_kept_states} beginnings of "
            f"prompts {show(footprint.state_bytes)}, "
        )
        cure = f"lower --max-num-seqs, {cure}"
    weights = (
        f"weights {show(footprint.weight_bytes)}" if footprint.weights else "beside its weights"
    )
    raise ConfigError(
        f"rank {rank} needs {show(needed)} ({weights}, a step's "
        f"activations {show(footprint.activation_bytes)}, {states}KV cache of one sequence of "
        f"{max_model_len} tokens {show(kv_bytes)}) but may use {show(max(0, budget.usable))} "
        f"of its device's memory: "
        f"{cure}raise --gpu-memory-utilization {config.gpu_memory_utilization}"
    )


def find_host_peak(
    footprint: Footprint, blocks: int, setup: MemorySetup, process_bytes: int = IMPORTED_BYTES
) -> int:
    """Most host memory of a rank: loading or serving.

    Args:
        process_bytes: of the process before it loads anything.
    """
    process = process_bytes + SERVER_BYTES
    if not setup.on_cpu:
        return process + footprint.load_bytes
    cache = max(0, blocks) * footprint.kv_bytes_per_block
    serving = footprint.fixed_bytes + cache
    return process + max(footprint.load_bytes, serving)


def check_host_peaks(peaks: list[int], config: ServingConfig) -> None:
    """Refuse ranks that together would take more of their host than --max-host-ram.

    Raises:
        ConfigError: with the numbers and the flags to change.
    """
    limit = config.max_host_ram
    if limit is not None and sum(peaks) > limit:
        raise ConfigError(
            f"the ranks on this host ({len(peaks)}) would take {show(sum(peaks))} of its memory at "
            f"their peak (the largest {show(max(peaks))}), over --max-host-ram {show(limit)}: "
            "raise it, choose a smaller --low-bit, or lower --kv-cache-memory or --max-model-len"
        )


def own_memory() -> int:
    """Resident set of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def show(num_bytes: float) -> str:
    """A size in the largest unit that leaves it above one."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
