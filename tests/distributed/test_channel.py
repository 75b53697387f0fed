"""The way of batches, between threads that stand in for ranks."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from autotp_serving.distributed import awake_reader, channel
from autotp_serving.distributed.channel import StepChannel
from autotp_serving.distributed.launch import LaunchError, LocalRankGroup


class ThreadRanks:
    """A group whose ranks are threads."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)
        self.before_return: Callable[[], None] = lambda: None


class ThreadRankGroup(LocalRankGroup):
    """One thread's place in the group."""

    def __init__(self, group: ThreadRanks, rank: int) -> None:
        size = len(group.values)
        super().__init__(rank, size, rank, size)
        self.group = group

    def all_gather(self, value: Any) -> list[Any]:
        self.group.values[self.rank] = value
        if self.group.barrier.wait() == 0:
            self.group.before_return()
        self.group.barrier.wait()
        values = list(self.group.values)
        self.group.barrier.wait()  # or who is quick gives its next value before others have read
        return values


def open_channels(group: ThreadRanks) -> list[StepChannel]:
    """Open one channel per rank, rank 0's first in the list."""
    size = len(group.values)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: StepChannel(ThreadRankGroup(group, rank)), range(size)))


def test_messages_reach_every_follower_whole_and_in_order() -> None:
    lead, *followers = open_channels(ThreadRanks(3))
    messages = [b"first", b"", b"x" * 100_000, b"last"]
    for message in messages:
        lead.send(message)
    for follower in followers:
        assert [follower.receive() for _ in messages] == messages


def test_a_message_larger_than_all_buffers_goes_through() -> None:
    lead, follower = open_channels(ThreadRanks(2))
    message = bytes(range(256)) * (64 * 2**20 // 256)
    sender = threading.Thread(target=lead.send, args=(message,))
    sender.start()
    assert follower.receive() == message
    sender.join()


def test_a_message_that_comes_late_finds_a_follower_asleep() -> None:
    """Past the first awake milliseconds the wait costs no CPU time."""
    lead, follower = open_channels(ThreadRanks(2))
    timer = threading.Timer(1.0, lead.send, [b"late"])
    timer.start()
    before = time.thread_time()
    assert follower.receive() == b"late"
    assert time.thread_time() - before < 0.2


def test_a_follower_whose_yields_are_long_waits_asleep_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each gave a core for 3 ms to whoever wanted it, of lowest priority or not."""
    lead, follower = open_channels(ThreadRanks(2))
    num_yields = 0

    def give_away() -> None:  # and the message comes meanwhile
        nonlocal num_yields
        num_yields += 1
        time.sleep(2 * awake_reader.LONG_YIELD_SECONDS)
        lead.send(b"step")

    monkeypatch.setattr(awake_reader.os, "sched_yield", give_away)
    monkeypatch.setattr(awake_reader, "SPIN_SECONDS", 60.0)
    monkeypatch.setattr(awake_reader, "REST_SECONDS", 60.0)
    for _ in range(awake_reader.MAX_LONG_WAITS):
        assert follower.receive() == b"step"
    assert num_yields == awake_reader.MAX_LONG_WAITS
    timer = threading.Timer(0.02, lead.send, [b"asleep"])
    timer.start()
    assert follower.receive() == b"asleep"
    assert num_yields == awake_reader.MAX_LONG_WAITS

    follower._reader.rests_until = 0.0  # that is over
    assert follower.receive() == b"step"
    assert num_yields == awake_reader.MAX_LONG_WAITS + 1


def test_a_header_in_pieces_is_put_together() -> None:
    lead, follower = open_channels(ThreadRanks(2))
    wire = lead._followers[1]
    for byte in struct.pack("!I", 2) + b"ab":
        timer = threading.Timer(0.02, wire.sendall, [bytes([byte])])
        timer.start()
        timer.join()
    assert follower.receive() == b"ab"


def test_a_group_of_one_sends_to_nobody() -> None:
    alone = StepChannel(LocalRankGroup())
    alone.send(b"batch")
    assert alone.take_reports(4) == {}


def test_peers_on_other_hosts_are_named_with_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts lost while nothing is sent are told of too, and once."""
    monkeypatch.setattr(channel, "own_host", lambda member: "127.0.0.1")
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{threading.get_ident()}")
    group = ThreadRanks(2)
    with ThreadPoolExecutor(2) as pool:
        spread = [ThreadRankGroup(group, rank) for rank in range(2)]
        for member in spread:
            member.local_size = 1
        lead, follower = pool.map(StepChannel, spread)
    told: list[str] = []
    heard = threading.Event()
    lead.monitor(lambda message: (told.append(message), heard.set()))
    follower._lead.close()
    assert heard.wait(10.0)
    assert lead.find_loss() == told[0]
    assert re.fullmatch(r"rank 1 on host host\d+ has died", told[0])


def test_a_group_that_is_whole_has_lost_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LOSS_SECONDS", 0.1)
    lead, _follower = open_channels(ThreadRanks(2))
    assert lead.find_loss() is None
    assert StepChannel(LocalRankGroup()).find_loss() is None


def test_who_was_told_to_stop_does_not_take_the_lead_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "STOP_PATIENCE", 0.5)
    lead, follower = open_channels(ThreadRanks(2))
    told: list[str] = []
    follower.monitor(told.append)
    lead.send(b"stop")
    lead._followers[1].close()
    assert follower.receive() == b"stop"
    follower.stop_monitoring()
    time.sleep(1.0)
    assert told == []


def test_who_is_stuck_is_told_that_the_lead_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "STOP_PATIENCE", 0.1)
    lead, follower = open_channels(ThreadRanks(2))
    told: list[str] = []
    heard = threading.Event()
    follower.monitor(lambda message: (told.append(message), heard.set()))
    lead._followers[1].close()
    assert heard.wait(10.0)
    assert told == ["rank 0 has died"]


def take_reports_until(lead: StepChannel, rank: int, last: bytes) -> dict[int, list[bytes]]:
    """All reports of 4 bytes that rank 0 sees, up to one of them."""
    seen: dict[int, list[bytes]] = {}
    deadline = time.monotonic() + 5.0
    while rank not in seen or seen[rank][-1] != last:
        assert time.monotonic() < deadline, seen
        for sender, report in lead.take_reports(4).items():
            seen.setdefault(sender, []).append(report)
    return seen


def test_reports_are_read_when_rank_0_likes_and_the_latest_counts() -> None:
    lead, first, second = open_channels(ThreadRanks(3))
    assert lead.take_reports(4) == {}
    for number in range(1000):
        first.report(struct.pack("!I", number))
    second.report(b"once")
    seen = take_reports_until(lead, 1, struct.pack("!I", 999))
    assert len(seen[1]) < 1000
    assert seen[2] == [b"once"]
    lead.send(b"batch")
    assert [first.receive(), second.receive()] == [b"batch", b"batch"]


def test_a_report_in_pieces_is_put_together() -> None:
    lead, follower = open_channels(ThreadRanks(2))
    follower.report(b"abcdef")
    assert take_reports_until(lead, 1, b"abcd") == {1: [b"abcd"]}
    follower.report(b"gh")
    assert take_reports_until(lead, 1, b"efgh") == {1: [b"efgh"]}


def test_a_follower_that_left_is_named_by_its_missing_reports() -> None:
    lead, follower = open_channels(ThreadRanks(2))
    follower._lead.close()
    with pytest.raises(ConnectionError, match="rank 1 has died"):
        take_reports_until(lead, 1, b"never")


@pytest.mark.parametrize(
    "greeting", [b"", b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"\0" * 20, b"short"]
)
def test_strangers_are_turned_away(greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port scanner that comes first neither takes a follower's place nor ends the start."""
    monkeypatch.setattr(channel, "GREETING_SECONDS", 0.2)
    group = ThreadRanks(2)
    strangers = []

    def come_first() -> None:
        strangers.append(socket.create_connection(group.values[0][0]))
        strangers[0].sendall(greeting)

    group.before_return = come_first
    lead, follower = open_channels(group)
    lead.send(b"batch")
    assert follower.receive() == b"batch"
    assert is_closed(strangers[0])


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer closes within seconds; with data unread that is a reset."""
    connection.settimeout(5)
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def test_a_dead_lead_is_named() -> None:
    lead, follower = open_channels(ThreadRanks(2))
    lead._followers[1].close()
    with pytest.raises(ConnectionError, match="rank 0 has died"):
        follower.receive()


def test_a_lead_that_dies_in_the_middle_of_a_message_is_noticed() -> None:
    lead, follower = open_channels(ThreadRanks(2))
    lead._followers[1].sendall(struct.pack("!I", 100) + b"half")
    lead._followers[1].close()
    with pytest.raises(ConnectionError, match="died"):
        follower.receive()


def test_a_dead_follower_is_named_by_its_rank() -> None:
    lead, first, second = open_channels(ThreadRanks(3))
    second._lead.close()
    with pytest.raises(ConnectionError, match="rank 2 has died"):
        for _ in range(100):  # some may still fit into a buffer
            lead.send(b"batch")
            time.sleep(0.01)
    assert first.receive() == b"batch"


def test_a_follower_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 0.2)
    group = ThreadRanks(2)
    absent = threading.Thread(target=ThreadRankGroup(group, 1).all_gather, args=((None, b"", ""),))
    absent.start()
    with pytest.raises(LaunchError, match=r"ranks \[1\] did not connect"):
        StepChannel(ThreadRankGroup(group, 0))
    absent.join()


def test_a_lead_that_cannot_be_reached_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    group = ThreadRanks(2)
    lead = threading.Thread(target=ThreadRankGroup(group, 0).all_gather, args=((address, b"", ""),))
    lead.start()
    with pytest.raises(LaunchError, match="rank 1 cannot reach rank 0"):
        StepChannel(ThreadRankGroup(group, 1))
    lead.join()
