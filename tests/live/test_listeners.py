"""Where the server's processes listen while two ranks serve on one host, and who gets in."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from autotp_serving.distributed.listeners import find_source
from tests.live.launch import Launch, torchrun

pytestmark = pytest.mark.live

LISTENS = "0A"
A_WHILE = 0.5  # seconds; whoever is let in on this machine is so in a fraction of a millisecond


def list_listeners(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process listens over TCP; what `ss -ltnp` shows of it."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                words = bytes.fromhex(address)  # 32 bits at a time, each in this machine's order
                turned = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.add((str(ipaddress.ip_address(turned)), int(port, 16)))
    return found


def is_let_in(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), A_WHILE).close()
    except OSError:
        return False
    return True


def own_address() -> str | None:
    """An address of this machine that is not loopback; connections to it come from it as well."""
    address = find_source(("198.51.100.1", 9))
    return None if address is None or address.startswith("127.") else address


def check_doors(server: Launch) -> None:
    """Only the server's port is open; the rest stays on loopback and admits nobody."""
    pids = server.rank_pids()
    assert len(pids) == 2
    for pid in pids:
        for address, port in list_listeners(pid):
            if port == server.port:
                assert address == "127.0.0.1" and is_let_in(address, port)
            else:
                assert ipaddress.ip_address(address).is_loopback, (address, port)
                assert not is_let_in(address, port), f"rank listens on {port} for everyone"


def test_ranks_under_mpirun_listen_on_loopback_for_nobody(server: Launch) -> None:
    check_doors(server)
    assert server.port in {port for _, port in list_listeners(server.rank_pids()[0])}
    launcher = {
        (address, port)
        for pid in set(server.processes()) - set(server.rank_pids())
        for address, port in list_listeners(pid)
    }
    ranks = {door for pid in server.rank_pids() for door in list_listeners(pid)}
    assert launcher and not launcher & ranks, "a rank holds the launcher's listener"
    if (address := own_address()) is not None:
        assert not any(is_let_in(address, port) for _, port in launcher)
    assert server.generate("still", 3)


def test_ranks_under_torchrun_listen_on_loopback_for_nobody(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    server = start(torchrun(2), *model_flags).wait_ready()
    check_doors(server)
    assert server.generate("still", 3)
