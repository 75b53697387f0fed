"""Which devices and cores each group of ranks gets. Head only.

Cards are shared out by the variables in which their drivers read which of them a process may see;
cores as ranks on CPU share them out among themselves (`distributed/placement.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autotp_serving.config import ConfigError
from autotp_serving.distributed.placement import Topology, find_placement

CUDA, XPU = "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"
VISIBLE_NAMES = {"cpu": (), "cuda": (CUDA,), "xpu": (XPU,), "auto": (CUDA, XPU)}
"""By kind of device, the lists of cards that a process may see, separated by commas."""


@dataclass(frozen=True)
class GroupPlace:
    """What is one group's alone.

    Attributes:
        name: the group's number; nothing where it is the only one.
        environ: variables of its ranks.
        cpus: logical CPUs that its ranks stay on; None for all.
    """

    name: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] | None = None


ANYWHERE = GroupPlace()


def find_places(
    num_groups: int,
    num_ranks: int,
    device: str,
    environ: Mapping[str, str],
    topology: Topology,
) -> list[GroupPlace]:
    """Share out cards and cores.

    Args:
        num_ranks: of each group.
        device: what they run on, see --device.
        topology: of the CPUs that this process may use.

    Raises:
        ConfigError: fewer cards are visible, or CPUs here, than all groups need.
    """
    if num_groups == 1:
        return [ANYWHERE]
    cpus = frozenset(cpu for _, cores in topology.nodes for core in cores for cpu in core)
    if num_groups > len(cpus):
        raise ConfigError(
            f"--data-parallel-size {num_groups}: each group needs a CPU of its own, and this "
            f"process may use {len(cpus)}: lower it"
        )
    places = []
    for group in range(num_groups):
        placement = find_placement(topology, [cpus] * num_groups, group)
        own = {} if "OMP_NUM_THREADS" in environ else {
            "OMP_NUM_THREADS": str(max(1, placement.threads // num_ranks))
        }  # fmt: skip
        for name in VISIBLE_NAMES[device]:
            cards = _list_cards(name, num_groups * num_ranks, environ)
            own[name] = ",".join(cards[group * num_ranks : (group + 1) * num_ranks])
        places.append(GroupPlace(str(group), own, placement.cpus))
    return places


def _list_cards(name: str, num_needed: int, environ: Mapping[str, str]) -> list[str]:
    """The cards that may be seen, as far as they are needed; an empty list hides all."""
    listed = environ.get(name)
    if listed is None:
        return [str(number) for number in range(num_needed)]
    cards = [card.strip() for card in listed.split(",") if card.strip()]
    if cards and cards != ["-1"] and len(cards) < num_needed:
        raise ConfigError(
            f"{name} shows {len(cards)} card(s), and all groups together need {num_needed}: lower "
            "--data-parallel-size or --tensor-parallel-size, or show more"
        )
    return cards
