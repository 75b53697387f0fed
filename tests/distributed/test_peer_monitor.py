"""A thread that sleeps until a peer is gone, on pairs of sockets."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from autotp_serving.distributed.peer_monitor import PeerMonitor, describe_loss, probe_peer

Pairs = dict[str, tuple[socket.socket, socket.socket]]


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    """Connections to two ranks, and the ranks' own ends."""
    made = {}
    for name in ("rank 1", "rank 2"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            made[name] = near, listener.accept()[0]
    yield made
    for pair in made.values():
        for end in pair:
            end.close()


class Notes:
    """What a monitor said."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.heard = threading.Event()

    def take(self, sentence: str) -> None:
        self.sentences.append(sentence)
        self.heard.set()


def near_ends(pairs: Pairs) -> dict[str, socket.socket]:
    return {name: near for name, (near, _) in pairs.items()}


def test_the_rank_that_goes_is_named_once(pairs: Pairs) -> None:
    notes = Notes()
    PeerMonitor(near_ends(pairs), notes.take)
    pairs["rank 2"][1].sendall(b"a report is no loss")
    assert not notes.heard.wait(0.2)
    pairs["rank 2"][1].close()
    assert notes.heard.wait(10.0)
    pairs["rank 1"][1].close()
    time.sleep(0.2)
    assert notes.sentences == ["rank 2 has died"]


def test_a_connection_that_ends_after_a_stop_is_no_loss(pairs: Pairs) -> None:
    notes = Notes()
    monitor = PeerMonitor(near_ends(pairs), notes.take)
    monitor.stop()
    monitor.stop()
    pairs["rank 1"][1].close()
    assert not notes.heard.wait(0.3)


def test_a_watch_costs_no_time_while_nothing_happens(pairs: Pairs) -> None:
    monitor = PeerMonitor(near_ends(pairs), lambda sentence: None)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    monitor.stop()


@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH])
def test_a_silent_host_is_told_from_a_dead_process(code: int) -> None:
    assert describe_loss("rank 3 on host beta", code) == (
        "rank 3 on host beta is lost: its host has not answered for 15 s"
    )
    for other in (None, 0, errno.ECONNRESET, errno.EPIPE):
        assert describe_loss("rank 3", other) == "rank 3 has died"


def test_the_kernel_is_asked_to_probe(pairs: Pairs) -> None:
    connection = pairs["rank 1"][0]
    probe_peer(connection)
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    interval = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
    count = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
    assert idle + interval * count == 15
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000


def pulses_of(pairs: Pairs) -> tuple[dict[str, socket.socket], dict[str, socket.socket]]:
    """Near and far ends of further connections by the same names."""
    near, far = {}, {}
    for name in pairs:
        near[name], far[name] = socket.socketpair()
    return near, far


def test_a_peer_without_a_pulse_is_told_and_one_with_it_is_not(pairs: Pairs) -> None:
    """As where its process is stopped: its connection is open, and its kernel answers."""
    near, far = pulses_of(pairs)
    notes, others = Notes(), Notes()
    peer = {"rank 0": pairs["rank 1"][1]}
    lively = PeerMonitor(peer, others.take, 0.0, {"rank 0": far["rank 1"]}, 0.5)
    PeerMonitor(near_ends(pairs), notes.take, 0.0, near, 0.5)
    assert notes.heard.wait(5.0)
    assert notes.sentences == ["rank 2 has not answered for 0.5 s: its process is stopped or hangs"]
    assert not others.heard.wait(0.7), "who has told of a loss still has a pulse itself"
    lively.stop()


WATCHER = """
import socket, sys, time
from autotp_serving.distributed.peer_monitor import PeerMonitor
link, pulse = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
PeerMonitor({"rank 0": link}, lambda loss: print(loss, flush=True), 0.0, {"rank 0": pulse}, 1.0)
time.sleep(60)
"""


def test_time_in_which_the_watcher_was_stopped_is_no_silence() -> None:
    """Someone stopped the whole group for a while, or the machine slept."""
    (link, far_link), (pulse, far_pulse) = socket.socketpair(), socket.socketpair()
    numbers = far_link.fileno(), far_pulse.fileno()
    command = [sys.executable, "-c", WATCHER, *map(str, numbers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=numbers) as watcher:
        try:
            assert pulse.recv(1), "it has begun"
            os.kill(watcher.pid, signal.SIGSTOP)
            time.sleep(3.0)
            os.kill(watcher.pid, signal.SIGCONT)
            for _ in range(15):
                pulse.send(b"x")
                time.sleep(0.1)
            os.set_blocking(watcher.stdout.fileno(), False)
            assert watcher.stdout.read() is None
            time.sleep(2.0)
            assert watcher.stdout.read().startswith(b"rank 0 has not answered")
        finally:
            watcher.kill()
            for end in (link, far_link, pulse, far_pulse):
                end.close()
