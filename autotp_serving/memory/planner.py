"""`--plan`: what a model will take on each rank, from its config.json. In one process, rank 0's.

No weight is read and no device is needed. Torch is imported only for a family that known_shapes.py
does not know, for a folder that was saved low-bit, and to look at a card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import DeviceError, open_device
from autotp_serving.devices.base import Memory, has_card_files, is_host_name, read_host_memory
from autotp_serving.low_bit.selection import MANIFEST_NAME, find_low_bit_selection
from autotp_serving.memory.budget import (
    MemoryBudget,
    check_budget,
    check_host_peaks,
    find_budget,
    find_host_peak,
    show,
)
from autotp_serving.memory.draft_plan import add_draft, find_draft_footprints
from autotp_serving.memory.footprint import Footprint, MemorySetup, find_footprint
from autotp_serving.memory.known_shapes import (
    list_known_names,
    list_known_shapes,
    read_known_config,
)
from autotp_serving.memory.plan_table import format_plan
from autotp_serving.model.families import adapt_rope, check_heads
from autotp_serving.model.leftovers import check_leftovers, check_stored
from autotp_serving.model.lengths import find_max_model_len
from autotp_serving.model.quantized.settings import find_quantization
from autotp_serving.model.shapes import find_dtype_name
from autotp_serving.model.stored_tensors import has_weights, list_stored_tensors, list_weight_files
from autotp_serving.model_folder import check_model_folder


def print_plan(config: ServingConfig, num_ranks: int, local_size: int) -> None:
    """Print the plan.

    Args:
        num_ranks: ranks to plan for.
        local_size: how many of them share a host.

    Raises:
        ConfigError: it does not fit; the plan has been printed then.
    """
    model_config, known = read_planned_config(config)
    max_model_len = find_max_model_len(config, model_config)
    kind, memory = find_memory(config)
    num_groups = config.data_parallel_size

    def make_plan(num_ranks: int, num_local: int) -> Plan:
        check_heads(model_config, num_ranks)
        setup = MemorySetup(config, max_model_len, is_host_name(kind), num_ranks, num_local)
        return find_plan(setup, model_config, known, memory)

    plan = make_plan(num_ranks, local_size * num_groups)
    print(
        format_plan(
            plan.setup, model_config, plan.footprints, plan.budgets, plan.peaks, kind, memory
        )
    )
    if num_groups > 1:
        num_devices = num_ranks * num_groups
        print(f"\nSo is each of {num_groups} groups. {num_devices} devices could be:")
        for size in (n for n in range(1, num_devices + 1) if num_devices % n == 0):
            print(describe_split(size, num_devices // size, make_plan))
    plan.check(local_size)


def read_planned_config(config: ServingConfig) -> tuple[Any, Any]:
    """A folder's config.json, and the same again if its shapes are known without torch, else None.

    Raises:
        ConfigError: it cannot be served.
    """
    folder = Path(config.model_path)
    check_model_folder(folder)
    is_other = config.pools or config.expert_parallel or is_converted(config, folder)
    known = None if is_other else read_known_config(folder)
    if known is not None and not check_known_names(config, folder, known):
        known = None
    if known is None:
        from autotp_serving.model.loader import read_model_config

        return read_model_config(config), None
    adapt_rope(known)
    return known, known


@dataclass(frozen=True)
class Plan:
    """What a group of ranks takes.

    Attributes:
        footprints, budgets, peaks: of each rank; the last are bytes of host memory.
    """

    setup: MemorySetup
    footprints: list[Footprint]
    budgets: list[MemoryBudget]
    peaks: list[int]

    def check(self, local_size: int) -> None:
        """Raise ConfigError if it does not fit.

        Args:
            local_size: ranks of one group on one host.
        """
        for rank, (footprint, budget) in enumerate(zip(self.footprints, self.budgets, strict=True)):
            check_budget(footprint, budget, self.setup, rank)
        num_groups = self.setup.local_size // local_size
        check_host_peaks(self.peaks[:local_size] * num_groups, self.setup.config)


def find_plan(setup: MemorySetup, model_config: Any, known: Any, memory: Memory) -> Plan:
    """The plan of one group."""
    footprints = find_footprints(setup, model_config, known)
    if setup.config.draft_model is not None:
        drafts = find_draft_footprints(setup)
        footprints = [add_draft(*both) for both in zip(footprints, drafts, strict=True)]
    budgets = [find_budget(footprint, setup, memory) for footprint in footprints]
    blocks = min(budget.blocks for budget in budgets)
    budgets = [replace(budget, blocks=blocks) for budget in budgets]
    peaks = [find_host_peak(footprint, blocks, setup) for footprint in footprints]
    return Plan(setup, footprints, budgets, peaks)


def describe_split(num_ranks: int, num_groups: int, make_plan: Callable[[int, int], Plan]) -> str:
    """Whether so many groups of so many ranks would serve the model, and what they would cost."""
    ranks = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
    split = f"- {num_groups} group{'s' if num_groups > 1 else ''} of {ranks}: "
    try:
        plan = make_plan(num_ranks, num_ranks * num_groups)
        plan.check(num_ranks)
    except ConfigError as error:
        return f"{split}no: {error}"
    weights = [footprint.weight_bytes for footprint in plan.footprints]
    num_tokens = plan.budgets[0].blocks * plan.setup.config.block_size
    return (
        f"{split}weights {show(max(weights))} a rank, {show(sum(weights) * num_groups)} in all; "
        f"KV cache for {num_tokens} tokens in each group, {num_tokens * num_groups} in all"
    )


def is_converted(config: ServingConfig, folder: Path) -> bool:
    """True where weights are stored low-bit, by --save-low-bit or by others.

    Raises:
        ConfigError: quantized in a way that is not read here, or without the weights that tell what
            becomes of them.
    """
    quantization = find_quantization(folder)
    if quantization is not None and not has_weights(folder, config.allow_pickle):
        list_weight_files(folder)  # says what is there instead, and what helps
    return quantization is not None or (folder / MANIFEST_NAME).exists()


def check_known_names(config: ServingConfig, folder: Path, known: Any) -> bool:
    """True if the folder's tensors, where there are any, are those of the known shapes.

    Raises:
        ConfigError: a file that cannot be read, or a tensor that can be no weight.
    """
    if config.load_format == "dummy" or not has_weights(folder):
        return True
    stored = list_stored_tensors(folder)
    check_stored(stored, stored)
    names = list_known_names(known)
    return not check_leftovers(
        stored.keys() - names, (), {name: tensor.shape for name, tensor in stored.items()}
    )


def find_memory(config: ServingConfig) -> tuple[str, Memory]:
    """Kind and memory of the device to plan for, which need not be here.

    Raises:
        ConfigError: it is not here, and its memory is not given.
    """
    if config.device_memory is not None:
        # A size that is given means a card, unless the processor is asked for by name.
        kind = "a card" if config.device == "auto" else config.device
        return kind, Memory(config.device_memory, config.device_memory)
    if is_host_name(config.device) or (config.device == "auto" and not has_card_files()):
        return "cpu", read_host_memory()
    try:
        device = open_device(config.device, 0)
    except DeviceError as error:
        raise ConfigError(
            f"--device {config.device}: {error} To plan without it, give --device-memory."
        ) from error
    return device.kind, device.memory()


def find_footprints(setup: MemorySetup, model_config: Any, known: Any = None) -> list[Footprint]:
    """The footprint of each rank.

    Args:
        known: of `read_known_config`; with it no torch is needed.
    """
    checkpoint = None
    if known is None:
        from autotp_serving.memory.meta_planner import list_shapes

        shapes, checkpoint = list_shapes(setup.config, model_config, setup.num_ranks)
    else:
        dtype, ranks = find_dtype_name(setup.config), range(setup.num_ranks)
        shapes = [list_known_shapes(known, rank, setup.num_ranks, dtype) for rank in ranks]
    low_bit = find_low_bit_selection(
        setup.config,
        checkpoint.low_bit if checkpoint else None,
        checkpoint is not None and checkpoint.is_quantized,
    )
    return [
        find_footprint(one, checkpoint, low_bit, setup, rank) for rank, one in enumerate(shapes)
    ]
