"""Where a rank on CPU runs: its cores, its memory nodes, its number of threads. Every rank.

Memory belongs to the node of the core that touches it first, so a rank that stays on the cores of
one node reads its weights from its own node. Standard library only; whatever started the ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
PROC = Path("/proc")
NUM_LOOKS = 9
LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class Topology:
    """The cores that this process may use, each as the logical CPUs it has for us.

    Attributes:
        nodes: per memory node that has such cores, its number and them, in order.
        quota: processors' worth of time that the container grants, or None for no limit.
    """

    nodes: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]
    quota: float | None

    @property
    def num_cores(self) -> int:
        """Over all nodes."""
        return sum(len(cores) for _, cores in self.nodes)


@dataclass(frozen=True)
class CpuPlacement:
    """One rank's share.

    Attributes:
        cpus: logical CPUs to stay on, or None to stay where the rank may run now.
        threads: one for each physical core, as far as the container's quota goes.
    """

    nodes: tuple[int, ...]
    num_cores: int
    cpus: tuple[int, ...] | None
    threads: int

    def describe(self) -> str:
        """For the log."""
        nodes = f"memory node{'s' if len(self.nodes) > 1 else ''} {join_ranges(self.nodes)}"
        where = f"{self.num_cores} core{'s' if self.num_cores > 1 else ''} of {nodes}"
        if self.cpus is None:
            return f"may use {where}"
        return f"stays on {where} (CPUs {join_ranges(self.cpus)})"


def find_placement(topology: Topology, masks: Sequence[frozenset[int]], index: int) -> CpuPlacement:
    """Deal out cores to the ranks of a host.

    Ranks that may run on the same CPUs share them: by whole nodes where there are several, the
    cores of a node dealt out to the ranks on it. What a launcher gave to a rank alone, it keeps.

    Args:
        topology: of what rank `index` may use.
        masks: per rank on this host, the CPUs it may run on.
        index: this rank's place among them.
    """
    all_nodes = tuple(number for number, _ in topology.nodes)
    sharing = [i for i, mask in enumerate(masks) if mask & masks[index]]
    stays = CpuPlacement(all_nodes, topology.num_cores, None, 1)
    are_alike = all(masks[i] == masks[index] for i in sharing)
    if are_alike and len(sharing) > 1 and len(topology.nodes) > 1:
        placement = _deal_nodes(topology, len(sharing), sharing.index(index))
        threads = placement.num_cores
    else:
        placement, threads = stays, topology.num_cores // len(sharing)
    if topology.quota is not None:
        threads = min(threads, int(topology.quota / len(masks)))
    return CpuPlacement(placement.nodes, placement.num_cores, placement.cpus, max(1, threads))


def _deal_nodes(topology: Topology, num_ranks: int, index: int) -> CpuPlacement:
    """A rank's nodes, or its part of one."""
    nodes = topology.nodes
    if num_ranks < len(nodes):
        # Neighbouring nodes are nearest to each other: the halves of a socket, say.
        first, stop = (len(nodes) * i // num_ranks for i in (index, index + 1))
        return _make_placement(nodes[first:stop])
    ranks_on = [1] * len(nodes)
    for _ in range(num_ranks - len(nodes)):
        roomiest = max(range(len(nodes)), key=lambda i: (len(nodes[i][1]) / (ranks_on[i] + 1), -i))
        ranks_on[roomiest] += 1
    number = 0
    while index >= ranks_on[number]:
        index -= ranks_on[number]
        number += 1
    node, cores = nodes[number]
    first, stop = (len(cores) * i // ranks_on[number] for i in (index, index + 1))
    # Of fewer cores than ranks, one is shared.
    return _make_placement([(node, cores[first : max(stop, first + 1)])])


def _make_placement(nodes: Sequence[tuple[int, tuple[tuple[int, ...], ...]]]) -> CpuPlacement:
    cores = [core for _, some in nodes for core in some]
    cpus = tuple(sorted(cpu for core in cores for cpu in core))
    return CpuPlacement(tuple(number for number, _ in nodes), len(cores), cpus, 1)


def read_topology(allowed: Iterable[int], sys: Path = SYS, proc: Path = PROC) -> Topology:
    """What Linux says of the CPUs in `allowed`; where it says nothing, one node of lone CPUs."""
    allowed = frozenset(allowed)
    nodes = []
    for folder in (sys / "devices/system/node").glob("node[0-9]*"):
        cpus = parse_ranges(_read(folder / "cpulist")) & allowed
        if cpus:  # else memory alone, or another's CPUs
            nodes.append((int(folder.name.removeprefix("node")), _find_cores(cpus, sys)))
    known = {cpu for _, cores in nodes for core in cores for cpu in core}
    if known != allowed:
        nodes = [(0, _find_cores(allowed, sys))]
    return Topology(tuple(sorted(nodes)), _read_quota(sys, proc))


def _find_cores(cpus: frozenset[int], sys: Path) -> tuple[tuple[int, ...], ...]:
    """Group logical CPUs by the core they are threads of."""
    cores = set()
    for cpu in cpus:
        path = sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(tuple(sorted(parse_ranges(_read(path)) & cpus | {cpu})))
    return tuple(sorted(cores))


def _read_quota(sys: Path, proc: Path) -> float | None:
    """The least that this process's control group, or one above it, grants (cgroup 2, then 1)."""
    root = sys / "fs/cgroup"
    own = ""
    for line in _read(proc / "self/cgroup").splitlines():
        if line.startswith("0::"):
            own = line[3:].strip().lstrip("/")
    folder = root / own
    quotas = []
    for path in (folder, *folder.parents):
        words = _read(path / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        if path == root:
            break
    if not quotas:
        quota, period = (_read(root / f"cpu/cpu.cfs_{word}_us") for word in ("quota", "period"))
        if quota.strip() and period.strip() and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def pin_to_cpus(cpus: Iterable[int], proc: Path = PROC) -> None:
    """Bind the threads that there are; later ones inherit it."""
    cpus = set(cpus)
    for thread in (proc / "self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cpus)
        except ProcessLookupError:
            continue  # it has ended meanwhile


def count_idle_cpus(proc: Path = PROC) -> int | None:
    """How many of the host's CPUs other programs leave alone, by a look that takes a tenth of a
    second; None where Linux does not say. This process counts as one that runs.

    A parallel region ends with its last thread: one thread more than there are CPUs to run them
    makes each of them wait for the scheduler, a thousand times a second.
    """
    looks = []
    num_cpus = 0
    for _ in range(NUM_LOOKS):
        lines = _read(proc / "stat").splitlines()
        num_cpus = sum(line.startswith("cpu") and line[3:4].isdigit() for line in lines)
        looks += [int(line.split()[1]) for line in lines if line.startswith("procs_running ")]
        time.sleep(LOOK_SECONDS)
    if not num_cpus or not looks:
        return None
    others = max(0, sorted(looks)[len(looks) // 2] - 1)
    return max(0, num_cpus - others)


def parse_ranges(text: str) -> frozenset[int]:
    """`0-3,8` as numbers."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def join_ranges(numbers: Iterable[int]) -> str:
    """The other way round."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _read(path: Path) -> str:
    """A small file's text; nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
