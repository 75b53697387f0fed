"""Who am I among the ranks, and how they agree at start-up: MPI or torchrun. Every rank.

Batches travel through `distributed/channel.py`, all-reduces inside the model through
`distributed/collectives.py`. A single process is a group of one and takes the same path.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed import listeners

logger = logging.getLogger(__name__)

MPI_SIZE_NAMES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")
FILES_OF_PROCESS = 64
FILES_PER_RANK = 16
"""Rank 0 has 70 files open when two ranks are ready, 78 of four; the rest is for connections."""

POLL_SECONDS = 0.002
FAILURE_SECONDS = 5.0
LAST_WORDS_SECONDS = 0.5
ABORT_SECONDS = 3.0
GROUP_TIMEOUT = timedelta(days=3650)  # an idle server waits inside a receive; idle is no fault


class LaunchError(RuntimeError):
    """The ranks do not form one group; the message says what to start instead."""


class GroupFailure(RuntimeError):
    """Some rank cannot start; every rank raises this with that rank's message."""


@dataclass(frozen=True)
class Failure:
    """What a rank that cannot start hands to the others in place of the value they await."""

    message: str


def raise_failure(values: list[Any]) -> list[Any]:
    """Return exchanged values, or raise GroupFailure if one of the ranks could not give its own."""
    for value in values:
        if isinstance(value, Failure):
            raise GroupFailure(value.message)
    return values


class RankGroup(Protocol):
    """One rank's view of its group.

    Attributes:
        own_listeners: sockets at which the program listened before it joined, see `listeners`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    own_listeners: frozenset[int]

    def all_gather(self, value: Any) -> list[Any]:
        """Exchange small picklable values among ranks; start-up only.

        Raises:
            GroupFailure: on every rank, when one of them gives a Failure.
            LaunchError: this rank gives a Failure that the others do not come to hear.
        """
        ...

    def abort(self, exit_code: int = 1) -> None:
        """End every rank at once; does not return."""
        ...


@dataclass
class LocalRankGroup:
    """A group of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    own_listeners: frozenset[int] = frozenset()

    def all_gather(self, value: Any) -> list[Any]:
        """The group is this process."""
        return raise_failure([value])

    def abort(self, exit_code: int = 1) -> None:
        """Leave, past any thread that still runs."""
        os._exit(exit_code)


class MpiRankGroup:
    """RankGroup over mpi4py, for ranks started by `mpirun`."""

    def __init__(self, launched_size: int) -> None:
        if "mpi4py.MPI" not in sys.modules:  # its own listeners look like the launcher's
            one_host = listeners.is_one_host(os.environ)
            if one_host:
                listeners.keep_to_loopback(os.environ)  # read as MPI starts
            listeners.close_inherited_listeners(narrow=one_host)
        self.own_listeners = listeners.list_listeners()
        from mpi4py import MPI

        self._mpi = MPI
        self._world = MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()
        if self.size != launched_size:
            raise LaunchError(
                f"mpirun started {launched_size} ranks but mpi4py sees {self.size}: they belong "
                "to different MPI installations. Use the mpirun that mpi4py was built for "
                f"(mpi4py runs on {MPI.Get_library_version().splitlines()[0].strip()})."
            )
        host = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = host.Get_rank()
        self.local_size = host.Get_size()
        host.Barrier()  # all have mapped it
        if self.local_rank == 0:
            unlink_mpich_memory(Path("/proc/self/maps"))

    def all_gather(self, value: Any) -> list[Any]:
        """Exchange pickled values, asleep until the last rank has come.

        Ranks may wait here for minutes while one of them compiles or reads from a slow disk. One
        that has failed does not: the others may be waiting for it in a collective of the model.
        """
        patience = FAILURE_SECONDS if isinstance(value, Failure) else float("inf")
        deadline = time.monotonic() + patience
        everyone_here = self._world.Ibarrier()
        while not everyone_here.Test():
            if time.monotonic() > deadline:
                raise LaunchError(value.message)
            time.sleep(POLL_SECONDS)
        return raise_failure(self._world.allgather(value))

    def abort(self, exit_code: int = 1) -> None:
        """Have mpirun end the whole job, and leave, though MPI may not hear us or not let us go.

        mpirun passes on what it has read of a rank's output, no more: it gets a moment to read why.
        """
        time.sleep(LAST_WORDS_SECONDS)
        threading.Thread(target=_exit_late, args=(exit_code,), daemon=True).start()
        self._world.Abort(exit_code)
        os._exit(exit_code)


class TorchRankGroup:
    """RankGroup over a Gloo group of its own, for ranks started by `torchrun`.

    Usable once `join_collectives` has started torch.distributed.
    """

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.own_listeners = listeners.list_listeners()
        self._gloo: Any = None

    def _group(self) -> Any:
        import torch.distributed as dist

        if self._gloo is None:
            self._gloo = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        return self._gloo

    def all_gather(self, value: Any) -> list[Any]:
        """Exchange pickled values. A Failure is not exchanged: torchrun ends the others."""
        import torch.distributed as dist

        if isinstance(value, Failure):
            raise LaunchError(value.message)
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group())
        return raise_failure(values)

    def abort(self, exit_code: int = 1) -> None:
        """Leave; torchrun ends the others."""
        os._exit(exit_code)


def join_group(environ: Mapping[str, str]) -> RankGroup:
    """Join the group that the launcher made.

    Raises:
        LaunchError: a launcher that is not known, or an MPI other than mpi4py's. Guessing would
            make every process think that it is rank 0.
    """
    for size_name in MPI_SIZE_NAMES:
        if size_name in environ:
            return MpiRankGroup(int(environ[size_name]))
    if "WORLD_SIZE" in environ and "RANK" in environ:
        size = int(environ["WORLD_SIZE"])
        if "LOCAL_RANK" not in environ or "LOCAL_WORLD_SIZE" not in environ:
            raise LaunchError(
                "RANK and WORLD_SIZE are set but LOCAL_RANK or LOCAL_WORLD_SIZE is not: start "
                "with torchrun or mpirun, or unset them to run as a single process."
            )
        if size == 1:
            return LocalRankGroup()
        return TorchRankGroup(
            int(environ["RANK"]),
            size,
            int(environ["LOCAL_RANK"]),
            int(environ["LOCAL_WORLD_SIZE"]),
        )
    for size_name in ("SLURM_STEP_NUM_TASKS", "MV2_COMM_WORLD_SIZE"):
        if int(environ.get(size_name, "1")) > 1:
            raise LaunchError(
                f"the launcher set {size_name}={environ[size_name]} but neither PMI's, Open MPI's "
                "nor torchrun's variables: start with mpirun or torchrun."
            )
    return LocalRankGroup()


def find_num_ranks(config: ServingConfig, group: RankGroup) -> int:
    """Number of ranks to serve with, or to plan for.

    Raises:
        ConfigError: --tensor-parallel-size is not what the launcher started.
    """
    asked = config.tensor_parallel_size or group.size
    if asked == group.size or (config.plan and group.size == 1):
        return asked
    raise ConfigError(
        f"--tensor-parallel-size {asked}, but {group.size} "
        f"{'ranks were' if group.size > 1 else 'rank was'} started: "
        f"start with mpirun -np {asked}, or leave the flag out"
    )


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, be it as the only one."""
    return any(name in environ for name in (*MPI_SIZE_NAMES, "WORLD_SIZE"))


def check_open_files(environ: Mapping[str, str]) -> None:
    """Refuse a limit of open files under which the ranks could not even join.

    Raises:
        LaunchError: with the limit and what is needed.
    """
    sizes = [environ[name] for name in (*MPI_SIZE_NAMES, "WORLD_SIZE") if name in environ]
    num_ranks = int(sizes[0]) if sizes and sizes[0].isdigit() else 1
    needed = FILES_OF_PROCESS + FILES_PER_RANK * num_ranks
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise LaunchError(
            f"this process may open {limit} files, and {num_ranks} rank(s) need {needed} each, "
            "connections not counted: raise the limit (ulimit -n 4096) and start again"
        )


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether the launcher calls this process rank 0; for what is said before the group is one."""
    names = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "SLURM_PROCID")
    return all(environ.get(name, "0") == "0" for name in names)


def find_launched_rank(environ: Mapping[str, str]) -> int | None:
    """This process's rank among several, as its launcher says; None where it is the only one."""
    pairs = (
        ("PMI_SIZE", "PMI_RANK"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMIX_SIZE", "PMIX_RANK"),
        ("WORLD_SIZE", "RANK"),
    )
    for size_name, rank_name in pairs:
        if size_name in environ and rank_name in environ:
            return int(environ[rank_name]) if int(environ[size_name]) > 1 else None
    return None


def own_host(group: RankGroup) -> str:
    """Address at which other ranks can meet this one: loopback unless they live on other hosts.

    Raises:
        LaunchError: this host's name leads only to itself.
    """
    if group.local_size == group.size:
        return "127.0.0.1"
    host = socket.gethostbyname(socket.gethostname())
    if host.startswith("127."):
        raise LaunchError(
            f"the name of this host, {socket.gethostname()}, resolves to {host}, which other "
            "hosts cannot reach: mend /etc/hosts"
        )
    return host


def leave_group(rank: int, message: str) -> None:
    """End this rank, from any thread, since it cannot go on; does not return.

    The launcher sees it end and ends the others that it can still reach.
    """
    logger.error("rank %d ends: %s", rank, message)
    os._exit(1)


def unlink_mpich_memory(maps: Path) -> None:
    """Take the name of MPICH's shared memory away: it would stay when a rank is killed, 1 MB each.

    Without a name the memory goes with the last process that maps it, however that ends.

    Args:
        maps: the kernel's list of what this process has mapped.
    """
    if not maps.exists():  # only Linux has it
        return
    for path in {line.split()[-1] for line in maps.read_text().splitlines() if line.strip()}:
        if path.startswith("/dev/shm/mpich_shm_"):
            Path(path).unlink(missing_ok=True)


def _exit_late(exit_code: int) -> None:
    """MPI's own exit waits for threads that are stuck in a collective with a rank that is gone."""
    time.sleep(ABORT_SECONDS)
    os._exit(exit_code)
