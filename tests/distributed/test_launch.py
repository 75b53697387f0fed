"""Which launcher started us, and who reports what: without a launcher and without MPI."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest

from autotp_serving.distributed import launch
from autotp_serving.distributed.launch import (
    Failure,
    GroupFailure,
    LaunchError,
    LocalRankGroup,
    TorchRankGroup,
    check_open_files,
    is_first_rank,
    join_group,
    own_host,
    raise_failure,
)

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


class FakeMpiRankGroup(LocalRankGroup):
    """Notes which size the launcher told."""

    def __init__(self, launched_size: int) -> None:
        super().__init__(size=launched_size)


def test_no_launcher_is_a_group_of_one() -> None:
    group = join_group({"HOME": "/", "PATH": ""})
    assert (group.rank, group.size, group.local_rank, group.local_size) == (0, 1, 0, 1)
    assert group.all_gather("value") == ["value"]


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE"])
def test_mpi_launchers_are_known_by_their_size(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "MpiRankGroup", FakeMpiRankGroup)
    group = join_group({name: "4"})
    assert isinstance(group, FakeMpiRankGroup) and group.size == 4


def test_mpirun_wins_over_variables_left_by_torchrun(monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "MpiRankGroup", FakeMpiRankGroup)
    assert join_group(TORCHRUN | {"PMI_SIZE": "2"}).size == 2


def test_torchrun() -> None:
    group = join_group(TORCHRUN)
    assert isinstance(group, TorchRankGroup)
    assert (group.rank, group.size, group.local_rank, group.local_size) == (1, 3, 1, 2)


def test_torchrun_with_one_process_is_a_group_of_one() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert isinstance(join_group(environ), LocalRankGroup)


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"MV2_COMM_WORLD_SIZE": "8"},
    ],
)
def test_an_unknown_launcher_is_refused(environ: dict[str, str]) -> None:
    """Guessing would make every process rank 0, each with a server of its own."""
    with pytest.raises(LaunchError, match="torchrun"):
        join_group(environ)


def test_a_slurm_step_of_one_task_is_a_group_of_one() -> None:
    assert join_group({"SLURM_STEP_NUM_TASKS": "1"}).size == 1


def test_an_mpi_other_than_mpi4pys_is_refused() -> None:
    """Under a foreign mpirun each rank's MPI sees a world of one."""
    code = (
        "from autotp_serving.distributed.launch import LaunchError, join_group\n"
        "try:\n"
        "    join_group({'OMPI_COMM_WORLD_SIZE': '2'})\n"
        "except LaunchError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "mpirun started 2 ranks but mpi4py sees 1" in done.stdout, done.stderr
    assert "mpi4py runs on" in done.stdout


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, False),
        ({"OMPI_COMM_WORLD_RANK": "3"}, False),
        (TORCHRUN, False),
        ({"SLURM_PROCID": "1"}, False),
    ],
)
def test_one_process_speaks_before_there_is_a_group(
    environ: dict[str, str], expected: bool
) -> None:
    assert is_first_rank(environ) is expected


def test_a_failure_of_any_rank_fails_all_with_its_message() -> None:
    with pytest.raises(GroupFailure, match="no card"):
        raise_failure(["value", Failure("no card")])
    with pytest.raises(GroupFailure, match="no card"):
        LocalRankGroup().all_gather(Failure("no card"))


def test_a_torchrun_rank_that_fails_says_so_itself() -> None:
    """No other rank may hear it, so a GroupFailure, which only rank 0 prints, would be lost."""
    with pytest.raises(LaunchError, match="no card"):
        TorchRankGroup(1, 2, 1, 2).all_gather(Failure("no card"))


def test_ranks_of_one_host_meet_on_loopback() -> None:
    assert own_host(LocalRankGroup(size=4, local_size=4)) == "127.0.0.1"


def test_a_host_name_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = LocalRankGroup(size=4, local_size=2)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(LaunchError, match="/etc/hosts"):
        own_host(spread)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    assert own_host(spread) == "10.0.0.7"


@pytest.mark.parametrize(
    ("limit", "num_ranks", "needed"), [(64, 1, 80), (64, 2, 96), (100, 8, 192)]
)
def test_too_few_files_are_told_before_the_ranks_join(
    limit: int, num_ranks: int, needed: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(launch.resource, "getrlimit", lambda which: (limit, 10**6))
    with pytest.raises(LaunchError, match=rf"{limit} files.* need {needed} .*ulimit -n"):
        check_open_files({"PMI_SIZE": str(num_ranks)})
    monkeypatch.setattr(launch.resource, "getrlimit", lambda which: (needed, needed))
    check_open_files({"PMI_SIZE": str(num_ranks)})


def test_any_number_of_files(monkeypatch: Any) -> None:
    no_limit = launch.resource.RLIM_INFINITY
    monkeypatch.setattr(launch.resource, "getrlimit", lambda which: (no_limit, no_limit))
    check_open_files({"PMI_SIZE": "64"})
