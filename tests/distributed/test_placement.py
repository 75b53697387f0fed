"""Which cores a rank takes, on machines made up of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotp_serving.distributed.placement import (
    CpuPlacement,
    Topology,
    count_idle_cpus,
    find_placement,
    join_ranges,
    parse_ranges,
    read_topology,
)


def make_machine(
    root: Path,
    nodes: dict[int, str],
    *,
    smt: int | None = None,
    files: dict[str, str] | None = None,
) -> Path:
    """A /sys of memory nodes with CPUs; CPU n and n + smt are threads of one core."""
    cpus: set[int] = set()
    for number, text in nodes.items():
        folder = root / f"devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{text}\n")
        cpus |= parse_ranges(text)
    for cpu in cpus:
        folder = root / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        siblings = [cpu] if smt is None else [cpu % smt, cpu % smt + smt]
        (folder / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")
    for name, text in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def deal(root: Path, num_ranks: int, allowed: str) -> list[CpuPlacement]:
    """The places of ranks that may all run on `allowed`."""
    mask = parse_ranges(allowed)
    topology = read_topology(mask, root, root / "proc")
    return [find_placement(topology, [mask] * num_ranks, index) for index in range(num_ranks)]


def show(places: list[CpuPlacement]) -> list[tuple[str, str | None, int]]:
    return [
        (join_ranges(p.nodes), None if p.cpus is None else join_ranges(p.cpus), p.threads)
        for p in places
    ]


def test_on_one_node_ranks_share_the_cores_and_the_system_decides_where(tmp_path: Path) -> None:
    make_machine(tmp_path, {0: "0-7"})
    assert show(deal(tmp_path, 2, "0-7")) == [("0", None, 4)] * 2
    assert show(deal(tmp_path, 3, "0-7")) == [("0", None, 2)] * 3
    assert show(deal(tmp_path, 16, "0-7")) == [("0", None, 1)] * 16


def test_threads_of_a_core_count_once(tmp_path: Path) -> None:
    make_machine(tmp_path, {0: "0-15"}, smt=8)
    assert show(deal(tmp_path, 2, "0-15")) == [("0", None, 4)] * 2
    assert show(deal(tmp_path, 1, "0-3,8-11")) == [("0", None, 4)]


def test_a_rank_stays_on_one_of_two_nodes_with_both_threads_of_its_cores(tmp_path: Path) -> None:
    make_machine(tmp_path, {0: "0-7,16-23", 1: "8-15,24-31"}, smt=16)
    first, second = "0-7,16-23", "8-15,24-31"
    assert show(deal(tmp_path, 2, "0-31")) == [("0", first, 8), ("1", second, 8)]
    halves = [("0", "0-3,16-19", 4), ("0", "4-7,20-23", 4)]
    assert show(deal(tmp_path, 4, "0-31"))[:2] == halves
    # Of three, one has a node for itself.
    assert show(deal(tmp_path, 3, "0-31")) == [*halves, ("1", second, 8)]
    assert show(deal(tmp_path, 1, "0-31")) == [("0-1", None, 16)]


def test_fewer_ranks_than_nodes_take_neighbouring_nodes_whole(tmp_path: Path) -> None:
    make_machine(tmp_path, {number: f"{4 * number}-{4 * number + 3}" for number in range(4)})
    assert show(deal(tmp_path, 2, "0-15")) == [("0-1", "0-7", 8), ("2-3", "8-15", 8)]
    assert show(deal(tmp_path, 3, "0-15"))[2] == ("2-3", "8-15", 8)


def test_memory_without_cpus_and_nodes_that_are_not_ours_get_no_rank(tmp_path: Path) -> None:
    make_machine(tmp_path, {0: "0-3", 1: "4-7", 2: "", 3: "8-11"})
    assert show(deal(tmp_path, 2, "0-7")) == [("0", "0-3", 4), ("1", "4-7", 4)]
    assert show(deal(tmp_path, 2, "0-3")) == [("0", None, 2)] * 2


def test_more_ranks_go_where_more_cores_are(tmp_path: Path) -> None:
    """As when a container has a part of one socket, and all of another."""
    make_machine(tmp_path, {0: "0-7", 1: "8-15"})
    assert show(deal(tmp_path, 3, "0-1,8-15")) == [
        ("0", "0-1", 2),
        ("1", "8-11", 4),
        ("1", "12-15", 4),
    ]
    # More ranks than cores: some share one.
    assert [p.threads for p in deal(tmp_path, 4, "0,8")] == [1] * 4


@pytest.mark.parametrize(
    "files",
    [
        {"fs/cgroup/cpu.max": "400000 100000\n"},
        {
            "proc/self/cgroup": "0::/a/b\n",
            "fs/cgroup/a/b/cpu.max": "max 100000\n",
            "fs/cgroup/a/cpu.max": "400000 100000\n",
            "fs/cgroup/cpu.max": "900000 100000\n",
        },
        {"fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
    ],
    ids=["container", "slice", "cgroup 1"],
)
def test_threads_stay_within_the_container_s_quota(tmp_path: Path, files: dict[str, str]) -> None:
    make_machine(tmp_path, {0: "0-7", 1: "8-15"}, files=files)
    assert show(deal(tmp_path, 2, "0-15")) == [("0", "0-7", 2), ("1", "8-15", 2)]
    assert show(deal(tmp_path, 8, "0-15"))[7] == ("1", "14-15", 1)
    assert show(deal(tmp_path, 1, "0-15")) == [("0-1", None, 4)]


def test_what_a_launcher_gave_to_a_rank_it_keeps(tmp_path: Path) -> None:
    make_machine(tmp_path, {0: "0-7", 1: "8-15"})
    masks = [parse_ranges(text) for text in ("0-7", "8-11", "8-11", "12-15")]
    places = [
        find_placement(read_topology(mask, tmp_path, tmp_path), masks, index)
        for index, mask in enumerate(masks)
    ]
    assert show(places) == [("0", None, 8), ("1", None, 2), ("1", None, 2), ("1", None, 4)]
    # Neither apart nor alike: nobody is moved.
    masks = [parse_ranges(text) for text in ("0-15", "8-15")]
    places = [
        find_placement(read_topology(mask, tmp_path, tmp_path), masks, index)
        for index, mask in enumerate(masks)
    ]
    assert show(places) == [("0-1", None, 8), ("1", None, 4)]


def test_without_a_topology_each_cpu_is_a_core_of_one_node(tmp_path: Path) -> None:
    assert read_topology({0, 1, 5}, tmp_path, tmp_path) == Topology(
        ((0, ((0,), (1,), (5,))),), None
    )


def test_the_log_says_where_a_rank_sits(tmp_path: Path) -> None:
    make_machine(tmp_path, {0: "0-3", 1: "4-7"})
    alone, two = deal(tmp_path, 1, "0-7"), deal(tmp_path, 2, "0-7")
    assert alone[0].describe() == "may use 8 cores of memory nodes 0-1"
    assert two[1].describe() == "stays on 4 cores of memory node 1 (CPUs 4-7)"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="not Linux")
def test_threads_that_run_already_are_bound_and_later_ones_too() -> None:
    program = """
import os, threading
from autotp_serving.distributed.placement import pin_to_cpus
cpu = min(os.sched_getaffinity(0))
seen, go, come = [], threading.Event(), threading.Event()
def look():
    come.set(); go.wait(); seen.append(os.sched_getaffinity(0))
early = threading.Thread(target=look); early.start(); come.wait()
pin_to_cpus([cpu])
late = threading.Thread(target=look); late.start(); go.set()
early.join(); late.join()
assert seen == [{cpu}, {cpu}], seen
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_cpus_that_other_programs_keep_busy_are_counted(tmp_path: Path) -> None:
    """This process, which looks, is one of those that run."""
    assert count_idle_cpus(tmp_path) is None
    for running, idle in ((1, 4), (3, 2), (5, 0), (9, 0)):
        cpus = "".join(f"cpu{number} 1 2 3\n" for number in range(4))
        (tmp_path / "stat").write_text(f"cpu  1 2 3\n{cpus}procs_running {running}\n")
        assert count_idle_cpus(tmp_path) == idle
