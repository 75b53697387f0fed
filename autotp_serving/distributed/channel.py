"""Batches from rank 0 to the others, their figures back: TCP connections to each follower.

Sockets rather than MPI: a rank that waits inside MPI keeps a core busy, polling it with sleeps
costs several percent of one, and a connection also tells that its peer has died or its host is
lost (`distributed/peer_monitor.py`). They work alike under every launcher. Messages are a 4-byte
length and that many bytes.

The port is open until the last rank has come. Over several hosts it admits their addresses alone;
everywhere a rank shows a secret, drawn by rank 0 and handed over by the launcher's own means.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable

from autotp_serving.distributed.awake_reader import AwakeReader
from autotp_serving.distributed.launch import LaunchError, RankGroup, own_host
from autotp_serving.distributed.listeners import admit_only, find_source, find_sources
from autotp_serving.distributed.peer_monitor import PeerMonitor, describe_loss, probe_peer

LENGTH = struct.Struct("!I")
SECRET_LEN = 16
CONNECT_SECONDS = 60.0
GREETING_SECONDS = 5.0
MAX_REPORT_BYTES = 2**16
STOP_PATIENCE = 2.0
LOSS_SECONDS = 1.0
SILENT_SHARE = 0.8


class StepChannel:
    """Carries messages from rank 0 to every other rank; all ranks open it together.

    Raises:
        LaunchError: ranks cannot reach one another.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._followers: dict[int, socket.socket] = {}
        self._lead: socket.socket | None = None
        self._pulses: dict[int, socket.socket] = {}  # second connections, see watch.py
        self._reports_lock = threading.Lock()
        self._reports: dict[int, bytearray] = {}  # of each follower, the beginning of its next
        self._names = ["rank 0"]
        self._monitor: PeerMonitor | None = None
        self._reader: AwakeReader | None = None
        if group.size == 1:
            return
        listener = self._listen() if group.rank == 0 else None
        secret = secrets.token_bytes(SECRET_LEN)
        address = listener.getsockname() if listener is not None else None
        gathered = group.all_gather((address, secret, socket.gethostname()))
        address, secret, _ = gathered[0]
        on_hosts = [f" on host {host}" for *_, host in gathered]
        if group.local_size == group.size:
            on_hosts = [""] * group.size
        self._names = [f"rank {rank}{on_host}" for rank, on_host in enumerate(on_hosts)]
        if group.local_size < group.size:
            sources = group.all_gather(find_source(address))
            if listener is not None:
                admit_only(listener, find_sources(sources))
        if listener is not None:
            with listener:
                self._accept_followers(listener, secret)
        else:
            self._lead = self._greet(address, secret, group.rank)
            self._reader = AwakeReader(self._lead)
            self._pulses[0] = self._greet(address, secret, group.size + group.rank)

    def _greet(self, address: tuple[str, int], secret: bytes, number: int) -> socket.socket:
        """Connect to rank 0: as number `rank` for batches, as `size + rank` for the pulse."""
        connection = self._connect(address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        probe_peer(connection)
        connection.sendall(secret + LENGTH.pack(number))
        connection.settimeout(None)
        return connection

    def _listen(self) -> socket.socket:
        listener = socket.create_server((own_host(self._group), 0))
        listener.settimeout(CONNECT_SECONDS)
        return listener

    def _connect(self, address: tuple[str, int]) -> socket.socket:
        try:
            return socket.create_connection(address, timeout=CONNECT_SECONDS)
        except OSError as error:
            raise LaunchError(
                f"rank {self._group.rank} cannot reach rank 0 at {address[0]} port {address[1]} "
                f"({error}): let the hosts of the group connect to one another on all ports"
            ) from error

    def _accept_followers(self, listener: socket.socket, secret: bytes) -> None:
        """Take two connections per follower; whoever does not know the secret is turned away."""
        size = self._group.size
        while len(self._followers) < size - 1 or len(self._pulses) < size - 1:
            try:
                peer, _ = listener.accept()
            except TimeoutError as error:
                missing = sorted(set(range(1, size)) - (set(self._followers) & set(self._pulses)))
                raise LaunchError(
                    f"ranks {missing} did not connect to rank 0 within {CONNECT_SECONDS:.0f} s: "
                    "let the hosts of the group connect to one another on all ports"
                ) from error
            peer.settimeout(GREETING_SECONDS)
            try:
                greeting = _read(peer, SECRET_LEN + LENGTH.size)
            except OSError:
                greeting = b""  # a stranger who left or says nothing
            if not hmac.compare_digest(greeting[:SECRET_LEN], secret):
                peer.close()
                continue
            peer.settimeout(None)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            probe_peer(peer)
            number = LENGTH.unpack(greeting[SECRET_LEN:])[0]
            if number < size:
                self._followers[number] = peer
            else:
                self._pulses[number - size] = peer

    def monitor(self, on_loss: Callable[[str], None], step_timeout: float | None = None) -> None:
        """Have `on_loss` called, in a thread of its own, should one of the peers be gone.

        Rank 0 monitors all others, and each of these monitors rank 0. On them `on_loss` comes late
        enough for a rank that is not stuck to have read why rank 0 left.

        Args:
            on_loss: is given a sentence that names the rank.
            step_timeout: seconds that a step may take, the same on all ranks. A peer's process must
                give a sign of life sooner, so that of several late ranks the right one is named.
                None waits for ever.
        """
        silence_seconds = None if step_timeout is None else SILENT_SHARE * step_timeout
        pulses = {self._names[rank]: pulse for rank, pulse in self._pulses.items()}
        if self._lead is not None:
            lead = {self._names[0]: self._lead}
            self._monitor = PeerMonitor(lead, on_loss, STOP_PATIENCE, pulses, silence_seconds)
        elif self._followers:
            followers = {self._names[rank]: peer for rank, peer in self._followers.items()}
            self._monitor = PeerMonitor(followers, on_loss, 0.0, pulses, silence_seconds)

    def stop_monitoring(self) -> None:
        """Peers leave from now on, and may."""
        if self._monitor is not None:
            self._monitor.stop()

    def name(self, rank: int) -> str:
        """A rank in words, with its host where there are several."""
        return self._names[rank]

    def find_loss(self) -> str | None:
        """On rank 0, where a collective has failed: which rank is gone, if one is."""
        ends = select.poll()
        ranks = {follower.fileno(): rank for rank, follower in self._followers.items()}
        for number in ranks:
            ends.register(number, select.POLLRDHUP)
        for number, _ in ends.poll(LOSS_SECONDS * 1000) if ranks else ():
            rank = ranks[number]
            code = self._followers[rank].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return describe_loss(self._names[rank], code)
        return None

    def send(self, message: bytes) -> None:
        """On rank 0: hand a message to every other rank.

        Raises:
            ConnectionError: naming the rank that is gone.
        """
        framed = LENGTH.pack(len(message)) + message
        for rank, follower in self._followers.items():
            try:
                follower.sendall(framed)
            except OSError as error:
                raise self._loss(rank, error) from error

    def report(self, message: bytes) -> None:
        """On the other ranks: tell rank 0 something, always of the same length."""
        assert self._lead is not None, "rank 0 has nobody to report to"
        try:
            self._lead.sendall(message)
        except OSError as error:
            raise self._loss(0, error) from error

    def take_reports(self, length: int) -> dict[int, bytes]:
        """On rank 0, without waiting: the latest report of each rank that has made one since.

        For any thread.

        Raises:
            ConnectionError: naming the rank that is gone.
        """
        with self._reports_lock:
            return self._take_reports(length)

    def _take_reports(self, length: int) -> dict[int, bytes]:
        latest = {}
        for rank, follower in self._followers.items():
            unread = self._reports.setdefault(rank, bytearray())
            try:
                data = follower.recv(MAX_REPORT_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._loss(rank, error) from error
            if not data:
                raise self._loss(rank)
            unread += data
            end = len(unread) - len(unread) % length
            if end:
                latest[rank] = bytes(unread[end - length : end])
                del unread[:end]
        return latest

    def receive(self) -> bytes:
        """On the other ranks: wait for the next message.

        Raises:
            ConnectionError: rank 0 is gone.
        """
        assert self._lead is not None and self._reader is not None, "rank 0 does not receive"
        try:
            header = self._reader.read(LENGTH.size)
            if not header:
                raise ConnectionError("closed")
            header += _read(self._lead, LENGTH.size - len(header))
            return _read(self._lead, LENGTH.unpack(header)[0])
        except OSError as error:
            raise self._loss(0, error) from error

    def _loss(self, rank: int, error: OSError | None = None) -> ConnectionError:
        """What to raise when the connection to a rank has ended."""
        return ConnectionError(describe_loss(self._names[rank], error.errno if error else None))


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """Read exactly that many bytes.

    Raises:
        ConnectionError: the peer closed the connection.
    """
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(num_bytes - len(parts))
        if not part:
            raise ConnectionError("closed")
        parts += part
    return bytes(parts)
