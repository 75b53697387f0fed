"""The store in which torch's ranks find one another: who keeps it, who gets in. Every rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from autotp_serving.distributed import listeners
from autotp_serving.distributed.launch import (
    GROUP_TIMEOUT,
    LaunchError,
    RankGroup,
    TorchRankGroup,
    own_host,
)

STORE_SCHEME = "autotp"
"""By which torch.distributed knows our way into the group."""


def has_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun keeps the store in which the ranks find one another."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def prepare_store(group: RankGroup) -> str:
    """Have rank 0 keep that store, at an address of its own; torch's would listen on all.

    Anyone who reaches it may read and write it, so only the hosts of the group do.

    Returns:
        How torch.distributed is to be told of it.

    Raises:
        LaunchError: the address that was given to rank 0 is not to be had.
    """
    from torch.distributed import TCPStore, register_rendezvous_handler

    listener: socket.socket | None = None
    if isinstance(group, TorchRankGroup):  # started by hand, one rank after the other
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if group.rank == 0:
            try:
                listener = socket.create_server(address)
            except OSError as error:
                raise LaunchError(
                    f"rank 0 cannot listen on MASTER_ADDR {address[0]} port {address[1]} "
                    f"({error.strerror}): name an address of its host, and a free port"
                ) from error
    else:
        if group.rank == 0:
            listener = socket.create_server((own_host(group), 0))
        address = group.all_gather(listener and listener.getsockname())[0]
        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        if group.local_size < group.size:
            sources = group.all_gather(listeners.find_source(address))
            if listener is not None:
                listeners.admit_only(listener, listeners.find_sources(sources))

    def join_store(_: str, **__: Any) -> Iterator[tuple[TCPStore, int, int]]:
        store = TCPStore(
            *address,
            group.size,
            is_master=listener is not None,
            timeout=GROUP_TIMEOUT,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        yield store, group.rank, group.size

    register_rendezvous_handler(STORE_SCHEME, join_store)
    return f"{STORE_SCHEME}://"


def close_doors(group: RankGroup, *, is_host: bool) -> None:
    """Once every rank has joined, admit nobody to what they joined by.

    On cards, and over several hosts, only to the store: NCCL and MPI may connect again when a path
    between two ranks is first used.
    """
    if group.size == 1:
        return
    if is_host and group.local_size == group.size:
        listeners.turn_everyone_away(keep=group.own_listeners)
    elif not has_store(os.environ) and group.rank == 0:
        listeners.turn_everyone_away(int(os.environ["MASTER_PORT"]))
