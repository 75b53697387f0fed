"""Where this process and its libraries listen, and for whom. Every rank; Linux.

MPI, Gloo, NCCL and torch's store open listening sockets that ask nobody for a secret. Where all
ranks are on one host they are told to stay on loopback; the store, which several hosts need, admits
the addresses of those hosts alone; and once the ranks have joined, whatever nobody will connect to
again turns everyone away. The kernel does that, by a filter on the socket: libraries that own one
do not notice, and nothing that is connected already is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.0/8"
LOOPBACK_INTERFACE = "lo"
INTERFACE_NAMES = (
    "UCX_NET_DEVICES",  # MPICH
    "FI_TCP_IFACE",  # Intel MPI and oneCCL, through libfabric
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "CCL_KVS_IFACE",  # oneCCL
)
"""By these variables libraries are told which network interface to use."""

SIZE_NAMES = (
    ("PMI_SIZE", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
"""In which launchers tell the number of ranks, and of those on this host."""

# Of Linux's asm/socket.h and linux/filter.h; Python's socket module does not have them.
SO_ATTACH_FILTER = 26
INSTRUCTION = struct.Struct("HBBI")
LOAD_WORD, MASK, SKIP_UNLESS_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
SOURCE_ADDRESS = 2**32 - 0x100000 + 12
"""Where a filter finds it in an IPv4 packet."""
WHOLE_PACKET = 2**32 - 1


def is_one_host(environ: Mapping[str, str]) -> bool:
    """Whether the launcher says that all ranks are on this host; False where it says nothing."""
    return any(
        environ.get(size_name) is not None and environ.get(size_name) == environ.get(local_name)
        for size_name, local_name in SIZE_NAMES
    )


def keep_to_loopback(environ: MutableMapping[str, str]) -> None:
    """Tell the libraries to listen on loopback alone; what the user has set for one stays."""
    for name in INTERFACE_NAMES:
        environ.setdefault(name, LOOPBACK_INTERFACE)


def close_inherited_listeners(*, narrow: bool) -> None:
    """Let go of the launcher's listening sockets, which a rank has no use for.

    Before MPI starts, whose own sockets are inheritable too.

    Args:
        narrow: have the launcher's own copy admit this host alone from now on.
    """
    for listener in _find_listeners():
        number = listener.fileno()
        if not os.get_inheritable(number):
            continue  # opened by this process: a socket that outlives `exec` had to be inheritable
        if narrow:
            admit_only(listener, [LOOPBACK])
        os.close(number)


def list_listeners() -> frozenset[int]:
    """The listening sockets that this process has now, by their inode numbers."""
    return frozenset(os.fstat(listener.fileno()).st_ino for listener in _find_listeners())


def turn_everyone_away(port: int | None = None, *, keep: Collection[int] = ()) -> None:
    """Admit nobody any more on this process's listening sockets, or on those at one port.

    Args:
        keep: sockets that are left as they are, see `list_listeners`.
    """
    for listener in _find_listeners():
        if os.fstat(listener.fileno()).st_ino in keep:
            continue
        if port in (None, listener.getsockname()[1]):
            admit_only(listener, [])


def admit_only(listener: socket.socket, networks: Iterable[str]) -> None:
    """Have the kernel drop whoever would connect from elsewhere, without an answer.

    Args:
        networks: IPv4 addresses, or networks as 10.0.0.0/24; with none, nobody is admitted.
    """
    code = []
    for network in map(ipaddress.IPv4Network, networks):
        code += [
            (LOAD_WORD, 0, 0, SOURCE_ADDRESS),
            (MASK, 0, 0, int(network.netmask)),
            (SKIP_UNLESS_EQUAL, 0, 1, int(network.network_address)),
            (RETURN, 0, 0, WHOLE_PACKET),
        ]
    code.append((RETURN, 0, 0, 0))
    packed = ctypes.create_string_buffer(b"".join(INSTRUCTION.pack(*item) for item in code))
    program = struct.pack("HP", len(code), ctypes.addressof(packed))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    except OSError as error:  # a sandbox may not have it: the firewall is left
        logger.warning(
            "Port %d stays open to all who reach %s (%s): let a firewall close it",
            *reversed(listener.getsockname()[:2]),
            error.strerror,
        )


def find_sources(addresses: Iterable[str | None]) -> list[str]:
    """What `admit_only` is to be told of what all ranks found by `find_source`."""
    return sorted({address for address in addresses if address is not None})


def find_source(address: tuple[str, int]) -> str | None:
    """The address of this host that another one sees when this one connects to it.

    None where no way leads there, which whoever does connect will tell better.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def _find_listeners() -> Iterator[socket.socket]:
    """TCP sockets of this process that listen; each is its owner's, and is not closed here."""
    for path in sorted(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # closed meanwhile, or no socket
            found = socket.socket(fileno=int(path.name))
            try:
                is_tcp = found.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield found
            finally:
                found.detach()
