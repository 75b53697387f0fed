"""Notice that another rank is gone or stopped, even from inside a collective. Every rank.

A thread sleeps in the kernel until a connection of the step channel ends. A process that dies
closes its own; that a host has fallen silent (link cut, power lost) the kernel finds by probing it.
A process that is stopped does neither: for those each side sends the other a byte now and then,
from this thread, so that a rank that is busy for a while is not taken for dead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping

SILENCE_SECONDS = 15
"""A host that acknowledges nothing for so long is lost."""
PROBE_SECONDS = 5

BEATS_TO_LOSS = 10
"""Beats that a peer may miss before it is taken for stopped."""

UNREACHABLE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


def probe_peer(connection: socket.socket) -> None:
    """Have the kernel end a connection whose other host has fallen silent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": PROBE_SECONDS,
        "TCP_KEEPINTVL": PROBE_SECONDS,
        "TCP_KEEPCNT": SILENCE_SECONDS // PROBE_SECONDS - 1,
        "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000,  # for data that waits to be acknowledged
    }
    for name, value in options.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def describe_loss(name: str, code: int | None) -> str:
    """One sentence on a rank whose connection has ended.

    Args:
        code: the connection's errno; none if the peer closed it.
    """
    if code in UNREACHABLE:
        return f"{name} is lost: its host has not answered for {SILENCE_SECONDS} s"
    return f"{name} has died"


class PeerMonitor:
    """Calls `on_loss` once, in its own thread, when the first of the peers is gone or silent.

    Args:
        connections: by the name of the rank at their other end.
        on_loss: is given a sentence that names it.
        patience: seconds in which a `stop` still prevents the call, for those who may find a
            message to stop before the end of the connection.
        pulses: further connections by the same names, on which each side sends a byte now and
            then. A process that is stopped sends none, though its kernel answers for it.
        silence_seconds: how long a peer may send none; None listens to no pulse.
        hears_silence: False only sends: the peers may be silent for as long as they like.
    """

    def __init__(
        self,
        connections: Mapping[str, socket.socket],
        on_loss: Callable[[str], None],
        patience: float = 0.0,
        pulses: Mapping[str, socket.socket] | None = None,
        silence_seconds: float | None = None,
        *,
        hears_silence: bool = True,
    ) -> None:
        self._connections = {item.fileno(): (name, item) for name, item in connections.items()}
        self._on_loss = on_loss
        self._patience = patience
        self._silence_seconds = silence_seconds
        self._hears_silence = hears_silence
        self._pulses = {}
        if pulses and silence_seconds is not None:
            self._pulses = {item.fileno(): (name, item) for name, item in pulses.items()}
        self._num_silent = dict.fromkeys(self._pulses, 0)  # beats since the peer was last heard
        self._stopped = threading.Event()
        self._wake_reader, self._wake_writer = os.pipe()
        threading.Thread(target=self._run, name="peer-monitor", daemon=True).start()

    def stop(self) -> None:
        """From now on connections may end. May be called twice."""
        if not self._stopped.is_set():
            self._stopped.set()
            os.close(self._wake_writer)

    def _run(self) -> None:
        ends = select.poll()
        ends.register(self._wake_reader)
        for number in self._connections:
            ends.register(number, select.POLLRDHUP)  # errors are told unasked
        for number in self._pulses:
            ends.register(number, select.POLLIN)
        loss = self._wait(ends)
        if loss is not None and not self._stopped.wait(self._patience):
            self._on_loss(loss)
        # The others are still to hear that this rank is alive, as long as it is.
        while self._pulses and not self._stopped.wait(self._beat_seconds):
            self._send_beats()
        os.close(self._wake_reader)

    @property
    def _beat_seconds(self) -> float:
        return self._silence_seconds / BEATS_TO_LOSS

    def _wait(self, ends: select.poll) -> str | None:
        """Sleep until a peer is lost, which the sentence tells, or until told to stop."""
        next_beat = time.monotonic()
        while True:
            timeout = None
            if self._pulses:
                timeout = max(0.0, next_beat - time.monotonic()) * 1000
            numbers = [number for number, _ in ends.poll(timeout)]
            if self._wake_reader in numbers:
                return None
            for number in numbers:
                if number in self._connections:
                    return self._describe_end(*self._connections[number])
                if not self._hear(number):
                    ends.unregister(number)  # the other connection ends too, and tells
            if self._pulses and time.monotonic() >= next_beat:
                # Counted in beats of our own: time in which this rank was stopped is no silence.
                next_beat = time.monotonic() + self._beat_seconds
                self._send_beats()
                for number in self._pulses:
                    self._num_silent[number] += 1
                    if self._hears_silence and self._num_silent[number] > BEATS_TO_LOSS:
                        return (
                            f"{self._pulses[number][0]} has not answered for "
                            f"{self._silence_seconds:g} s: its process is stopped or hangs"
                        )

    def _send_beats(self) -> None:
        for _, pulse in self._pulses.values():
            with contextlib.suppress(OSError):  # full, its reader being stopped, or ended
                pulse.send(b"\0", socket.MSG_DONTWAIT)

    def _hear(self, number: int) -> bool:
        """Take what a peer has sent; False at the connection's end."""
        try:
            data = self._pulses[number][1].recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self._num_silent[number] = 0
        return bool(data)

    @staticmethod
    def _describe_end(name: str, connection: socket.socket) -> str:
        code = None
        with contextlib.suppress(OSError):  # closed by this process meanwhile
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return describe_loss(name, code)
