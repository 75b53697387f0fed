"""The text of `--plan`: one column per rank and one for their sum. Rank 0 only."""

from __future__ import annotations

from typing import Any

from autotp_serving.devices.base import Memory
from autotp_serving.memory.budget import MemoryBudget, show
from autotp_serving.memory.footprint import KINDS, Footprint, MemorySetup

ESTIMATE = (
    "Activations are an estimate: the tensors of transformers' code at its widest step, without "
    "what\nkernels use inside. Host memory counts the process of each rank, and the model."
)


def format_plan(
    setup: MemorySetup,
    model_config: Any,
    footprints: list[Footprint],
    budgets: list[MemoryBudget],
    host_peaks: list[int],
    kind: str,
    memory: Memory,
) -> str:
    """Lay out the plan; all ranks have the same number of blocks."""
    config = setup.config
    blocks = max(0, budgets[0].blocks)
    formats = list(dict.fromkeys(key[1] for item in footprints for key in item.weights))
    keys = [
        (part, name)
        for part in KINDS
        for name in formats
        if any((part, name) in item.weights for item in footprints)
    ]
    rows = [["", *(f"rank {rank}" for rank in range(len(footprints))), "all"]]

    def add(label: str, sizes: list[int]) -> None:
        rows.append([label, *map(show, sizes), show(sum(sizes))])

    for part, name in keys:
        add(f"{part}, {name}", [item.weights.get((part, name), 0) for item in footprints])
    add("weights together", [item.weight_bytes for item in footprints])
    per_token = [item.kv_bytes_per_block / config.block_size for item in footprints]
    cache = "KV cache, int8" if config.kv_cache_dtype == "int8" else "KV cache"
    add(f"{cache}, a token", per_token)
    add(
        f"{cache}, {blocks * config.block_size} tokens",
        [blocks * item.kv_bytes_per_block for item in footprints],
    )
    add(
        f"activations, {config.max_num_batched_tokens} tokens",
        [item.activation_bytes for item in footprints],
    )
    if any(item.state_bytes for item in footprints):
        label = f"states, {config.max_num_seqs} sequences, {config.num_kept_states} kept"
        add(label, [item.state_bytes for item in footprints])
    add(
        "device together",
        [item.fixed_bytes + blocks * item.kv_bytes_per_block for item in footprints],
    )
    add("host memory, peak", host_peaks)
    named = " and ".join(formats)
    title = (
        f"{model_config.model_type}, {len(footprints)} "
        f"rank{'s' if len(footprints) > 1 else ''}, {named}, on {kind} with "
        f"{show(memory.total)}, {show(memory.free)} of it free; a rank may use "
        f"{show(min(budget.usable for budget in budgets))}"
    )
    lines = [title, "", *_align(rows), "", _format_capacity(setup, budgets[0])]
    return "\n".join([*lines, ESTIMATE])


def _format_capacity(setup: MemorySetup, budget: MemoryBudget) -> str:
    """How many sequences fit beside each other, for a few lengths."""
    config, max_model_len = setup.config, setup.max_model_len
    tokens = max(0, budget.blocks) * config.block_size
    lengths = [max_model_len // part for part in (1, 2, 4, 8) if max_model_len >= part]
    fits = ", ".join(f"{tokens // length} of {length}" for length in lengths)
    longest = min(tokens, max_model_len)
    return (
        f"The cache holds {tokens} tokens: one sequence of {longest}, or sequences {fits} tokens "
        f"(a step runs at most {config.max_num_seqs})."
    )


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
