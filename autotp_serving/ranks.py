"""Who am I among the ranks, and how rank 0 tells the others what to do. Every rank.

Control messages are bytes from rank 0, over MPI under `mpirun`, over Gloo under `torchrun`. The
collectives of the model itself are DeepSpeed's and belong to the device. A single process is a
group of one and takes the same path.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

SPIN_SECONDS = 0.02
LONGEST_SLEEP_SECONDS = 0.002
GROUP_TIMEOUT = timedelta(days=3650)  # an idle server waits inside a receive; idle is no fault


class LaunchError(RuntimeError):
    """The ranks do not form one group; the message says what to start instead."""


class Control(Protocol):
    """The way from rank 0 to the others, and a few collectives for start-up."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def send(self, message: bytes) -> None:
        """On rank 0: hand a message to every other rank."""
        ...

    def receive(self) -> bytes:
        """On the other ranks: wait for the next message, asleep while the server is idle."""
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """Exchange small picklable values among ranks; start-up only."""
        ...

    def abort(self) -> None:
        """End every rank at once with a failing exit code; does not return under MPI."""
        ...


@dataclass
class LocalControl:
    """A group of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def send(self, message: bytes) -> None:
        """There is nobody to tell."""

    def receive(self) -> bytes:
        """Rank 0 never receives."""
        raise RuntimeError("a group of one has no follower")

    def all_gather(self, value: Any) -> list[Any]:
        """The group is this process."""
        return [value]

    def abort(self) -> None:
        """Leave with a failing exit code, past any thread that still runs."""
        os._exit(1)


class MpiControl:
    """Control over mpi4py, for ranks started by `mpirun`."""

    def __init__(self, launched_size: int) -> None:
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

    def send(self, message: bytes) -> None:
        """Send point to point: a follower can then look for a message without blocking in MPI."""
        for rank in range(1, self.size):
            self._world.Send([message, self._mpi.BYTE], dest=rank)

    def receive(self) -> bytes:
        """Look for a message, eagerly at first; the longer none comes, the longer the sleeps.

        A rank blocked inside MPI would keep a core busy for as long as the server is idle.
        """
        status = self._mpi.Status()
        started = time.monotonic()
        sleep_seconds = 0.0001
        while not self._world.Iprobe(source=0, status=status):
            if time.monotonic() - started < SPIN_SECONDS:
                os.sched_yield()
            else:
                time.sleep(sleep_seconds)
                sleep_seconds = min(2 * sleep_seconds, LONGEST_SLEEP_SECONDS)
        message = bytearray(status.Get_count(self._mpi.BYTE))
        self._world.Recv([message, self._mpi.BYTE], source=0)
        return bytes(message)

    def all_gather(self, value: Any) -> list[Any]:
        """Exchange pickled values."""
        return self._world.allgather(value)

    def abort(self) -> None:
        """Have mpirun end the whole job."""
        self._world.Abort(1)


class TorchControl:
    """Control over a Gloo group of its own, for ranks started by `torchrun`.

    Usable once `join_collectives` has started torch.distributed.
    """

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._gloo: Any = None

    def _group(self) -> Any:
        import torch.distributed as dist

        if self._gloo is None:
            self._gloo = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        return self._gloo

    def send(self, message: bytes) -> None:
        """Broadcast the length, then the bytes."""
        self._broadcast(message)

    def receive(self) -> bytes:
        """Wait in Gloo, which sleeps on its socket."""
        return self._broadcast(None)

    def _broadcast(self, message: bytes | None) -> bytes:
        import torch
        import torch.distributed as dist

        length = torch.tensor([len(message or b"")], dtype=torch.int64)
        dist.broadcast(length, src=0, group=self._group())
        if not length:
            return b""
        buffer = torch.frombuffer(
            bytearray(message if message is not None else int(length)), dtype=torch.uint8
        )
        dist.broadcast(buffer, src=0, group=self._group())
        return buffer.numpy().tobytes()

    def all_gather(self, value: Any) -> list[Any]:
        """Exchange pickled values."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group())
        return values

    def abort(self) -> None:
        """Leave with a failing exit code; torchrun ends the others."""
        os._exit(1)


def join_control(environ: Mapping[str, str]) -> Control:
    """Join the group that the launcher made.

    Raises:
        LaunchError: a launcher that is not known, or an MPI other than mpi4py's. Guessing would
            make every process think that it is rank 0.
    """
    for size_name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE"):
        if size_name in environ:
            return MpiControl(int(environ[size_name]))
    if "WORLD_SIZE" in environ and "RANK" in environ:
        size = int(environ["WORLD_SIZE"])
        if "LOCAL_RANK" not in environ or "LOCAL_WORLD_SIZE" not in environ:
            raise LaunchError(
                "RANK and WORLD_SIZE are set but LOCAL_RANK or LOCAL_WORLD_SIZE is not: start "
                "with torchrun or mpirun, or unset them to run as a single process."
            )
        if size == 1:
            return LocalControl()
        return TorchControl(
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
    return LocalControl()


def join_collectives(control: Control, device_kind: str, backend: str) -> Callable[[Any], Any]:
    """Start DeepSpeed's collectives for the model, on every rank.

    DeepSpeed reads the group from the environment; `LOCAL_SIZE` must be right before its
    shared-memory all-reduce starts, or that crashes.

    Returns:
        A function that sums a tensor over the ranks, in place, and returns it.
    """
    if control.size == 1:
        return lambda tensor: tensor
    if not isinstance(control, TorchControl):
        address, port = control.all_gather(_own_address(control))[0]
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
    os.environ.update(
        RANK=str(control.rank),
        WORLD_SIZE=str(control.size),
        LOCAL_RANK=str(control.local_rank),
        LOCAL_SIZE=str(control.local_size),
        DS_ACCELERATOR=device_kind,
    )
    import deepspeed
    import deepspeed.comm

    deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False)

    def all_reduce(tensor: Any) -> Any:
        deepspeed.comm.inference_all_reduce(tensor)
        return tensor

    return all_reduce


def _own_address(control: Control) -> tuple[str, str]:
    """Where rank 0 can be met: the loopback address unless ranks live on several hosts."""
    host = "127.0.0.1"
    if control.local_size < control.size:
        host = socket.gethostbyname(socket.gethostname())
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, str(probe.getsockname()[1])
