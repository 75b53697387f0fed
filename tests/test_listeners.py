"""Who is admitted to a listening socket, and whether all ranks are on one host: without ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from autotp_serving.distributed import listeners
from autotp_serving.distributed.launch import LaunchError, TorchRankGroup
from autotp_serving.distributed.listeners import admit_only, is_one_host, keep_to_loopback
from autotp_serving.distributed.store import prepare_store

A_WHILE = 0.3


def is_let_in(listener: socket.socket, source: str = "127.0.0.1") -> bool:
    port = listener.getsockname()[1]
    try:
        socket.create_connection(("127.0.0.1", port), A_WHILE, (source, 0)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("networks", "admitted"),
    [
        ([], set()),
        (["127.0.0.1"], {"127.0.0.1"}),
        (["10.0.0.7", "127.0.0.2"], {"127.0.0.2"}),
        (["127.0.0.0/30"], {"127.0.0.1", "127.0.0.2"}),
        (["127.0.0.0/8"], {"127.0.0.1", "127.0.0.2", "127.9.9.9"}),
    ],
)
def test_only_the_networks_named_are_admitted(networks: list[str], admitted: set[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sources = ("127.0.0.1", "127.0.0.2", "127.9.9.9")
        assert all(is_let_in(listener, source) for source in sources)
        admit_only(listener, networks)
        assert {source for source in sources if is_let_in(listener, source)} == admitted


def test_whoever_is_connected_stays_so_when_the_door_closes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        with client, peer, socket.create_server(("127.0.0.1", 0)) as other:
            listeners.turn_everyone_away(listener.getsockname()[1])
            assert not is_let_in(listener) and is_let_in(other)
            client.sendall(b"still here")
            assert peer.recv(20) == b"still here"


def test_what_the_program_itself_listens_at_stays_open() -> None:
    """A script with a server of its own that made an LLM on several ranks lost its clients."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        before = listeners.list_listeners()
        with socket.create_server(("127.0.0.1", 0)) as later:
            listeners.turn_everyone_away(keep=before)
            assert is_let_in(own) and not is_let_in(later)


def test_a_dual_socket_admits_by_the_addresses_of_version_4() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        admit_only(listener, ["127.0.0.2"])
        assert is_let_in(listener, "127.0.0.2") and not is_let_in(listener)
        with pytest.raises(OSError):
            socket.create_connection(("::1", listener.getsockname()[1]), A_WHILE)


def test_inherited_listeners_are_closed_and_narrowed_and_own_ones_kept() -> None:
    code = (
        "import socket\n"
        "from autotp_serving.distributed.listeners import close_inherited_listeners\n"
        "own = socket.create_server(('127.0.0.1', 0))\n"
        "close_inherited_listeners(narrow=True)\n"
        "socket.create_connection(own.getsockname(), 1).close()\n"
        "import os, sys\n"
        "try:\n"
        "    os.fstat(int(sys.argv[1]))\n"
        "except OSError:\n"
        "    print('closed')\n"
    )
    with socket.create_server(("0.0.0.0", 0)) as listener, socket.socket() as connected:
        connected.connect(listener.getsockname())
        number = listener.fileno()
        done = subprocess.run(
            [sys.executable, "-c", code, str(number)],
            pass_fds=[number, connected.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "closed\n", done.stderr
        assert is_let_in(listener)  # from loopback, and open here as before


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, True),
        ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, False),
        ({"PMI_SIZE": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, False),
    ],
)
def test_one_host_is_what_the_launcher_says(environ: dict[str, str], expected: bool) -> None:
    assert is_one_host(environ) is expected


def test_an_address_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks started by hand are told where to meet, and rank 0 may not be able to be there."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(LaunchError, match=r"MASTER_ADDR 127\.0\.0\.1 port"):
            prepare_store(TorchRankGroup(0, 2, 0, 2))


def test_an_interface_that_the_user_named_stays() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth1"}
    keep_to_loopback(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "eth1" and environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_a_kernel_without_filters_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listeners, "SO_ATTACH_FILTER", 9999)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        admit_only(listener, [])
        assert f"Port {listener.getsockname()[1]} stays open" in caplog.text
        assert os.strerror(92) in caplog.text and is_let_in(listener)
