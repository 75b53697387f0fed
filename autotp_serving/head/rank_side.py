"""The head as a rank sees it: how to reach it, its settings, its steps. Every rank.

A rank whose head has died ends at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import MutableMapping
from functools import partial

from autotp_serving.batch import Batch, DraftInput, Runner, ScoreInput
from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.config import ServingConfig
from autotp_serving.distributed.channel import LENGTH, SILENT_SHARE
from autotp_serving.distributed.launch import LaunchError, leave_group
from autotp_serving.distributed.peer_monitor import PeerMonitor
from autotp_serving.head.wire import (
    Line,
    LineClosed,
    Ready,
    SampleReader,
    pack_result,
    unpack_pools,
)
from autotp_serving.request import AdapterError

HEAD_NAME = "AUTOTP_HEAD"
"""Of the variable in which the head tells ranks its socket, the secret and their number."""


class HeadLine:
    """A rank's connections to the head that started it.

    Args:
        address: of the head's socket.
        secret: to show there.
        rank: which rank this is.
        num_ranks: of how many.
        num_loading: groups that are yet to take their part of the host's memory, its own included.
        group_name: of its group, where there are several.

    Attributes:
        config: the head's settings, which are this rank's.

    Raises:
        LaunchError: the head is gone.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        rank: int,
        num_ranks: int,
        num_loading: int = 1,
        group_name: str = "",
    ) -> None:
        self._rank = rank
        self.num_loading, self.group_name = num_loading, group_name
        # Awake, this rank would keep the head from a core that both need.
        has_room = len(os.sched_getaffinity(0)) > num_ranks
        try:
            self._line = Line(_greet(address, secret, rank), is_awake=has_room)
            pulse = _greet(address, secret, num_ranks + rank)
            self.config = ServingConfig(**self._line.receive())
        except OSError as error:
            raise LaunchError("the process that started this rank is gone") from error
        self._monitor = PeerMonitor(
            {"the head": self._line.connection},
            partial(leave_group, rank),
            pulses={"the head": pulse},
            silence_seconds=SILENT_SHARE * self.config.step_timeout,
            hears_silence=False,  # a head that is stopped may go on, and finds its ranks
        )

    def refuse(self, message: str) -> None:
        """Tell why this rank cannot start."""
        with contextlib.suppress(LineClosed):  # another rank has told, and the head is gone
            self._line.send(("refused", message))

    def run_steps(
        self, runner: Runner, max_model_len: int, vocab_size: int, device_kind: str
    ) -> None:
        """On rank 0: run what the head sends until it says stop.

        Args:
            runner: runs on all ranks.
            max_model_len: most tokens of a prompt and its completion together.
            vocab_size: tokens that the model has an embedding and logits for.
            device_kind: where it runs.
        """
        sizes = runner.num_blocks, runner.block_size, runner.max_in_flight
        can = runner.has_states, runner.can_draft
        stored = list(runner.stored_blocks)
        ready = Ready(*sizes, *can, max_model_len, vocab_size, device_kind, stored)
        try:
            self._line.send(("ready", *ready))
            run_steps(self._line, runner)
        except LineClosed:
            leave_group(self._rank, "the head has given this group up, or has died")

    def close(self) -> None:
        """The head may end from now on."""
        self._monitor.stop()


def run_steps(line: Line, runner: Runner) -> None:
    """Run what comes on the line until "stop".

    A result goes back as soon as no further step may begin before, or "collect" asks for it.

    Raises:
        LineClosed: the head is gone.
    """
    reader = SampleReader()
    begun: deque[tuple[int, int]] = deque()  # epoch and number of each step in flight
    while True:
        kind, *step = line.receive()
        if kind == "stop":
            return
        if kind == "transfer":
            line.send(("transferred", runner.transfer(BlockTransfer.from_bytes(step[0]))))
            continue
        if kind == "draft":
            drafts = [DraftInput(*one) for one in step[1]]
            line.send(runner.draft(Batch.from_bytes(step[0]), drafts))
            continue
        if kind == "load adapter":
            line.send(_load_adapter(runner, *step))
            continue
        if kind == "drop adapter":
            runner.drop_adapter(*step)
            continue
        if kind == "step":
            epoch, number, batch, samples, scores, pools, released = step
            for request_id in released:
                runner.release(request_id)
                reader.release(request_id)
            runner.forward(Batch.from_bytes(batch))
            runner.sample(
                reader.unpack(samples),
                [ScoreInput(*score) for score in scores],
                unpack_pools(pools),
            )
            begun.append((epoch, number))
        if kind == "collect" or len(begun) == runner.max_in_flight:
            result = pack_result(runner.collect())
            times = [tuple(one) for one in runner.rank_times]
            line.send((*begun.popleft(), times, result))


def _load_adapter(runner: Runner, slot: int, path: str) -> str | None:
    """Why it is not served, or None."""
    try:
        runner.load_adapter(slot, path)
    except AdapterError as error:
        return str(error)
    return None


def find_head(environ: MutableMapping[str, str], rank: int) -> HeadLine | None:
    """Join the head that started this rank; None where a launcher did.

    What it says in the environment is taken out, so that no child of this process reads it.
    """
    told = environ.pop(HEAD_NAME, None)
    if told is None:
        return None
    address, secret, num_ranks, num_loading, *name = told.split()
    if int(num_ranks) == 1 and sys.platform == "linux":
        # No stand-in does: one that is stopped goes on when the head dies, and so ends.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGCONT)
    return HeadLine(
        address, bytes.fromhex(secret), rank, int(num_ranks), int(num_loading), "".join(name)
    )


def _greet(address: str, secret: bytes, number: int) -> socket.socket:
    """Connect: as number `rank` for messages, as `num_ranks + rank` for the pulse."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{address}")
    connection.sendall(secret + LENGTH.pack(number))
    return connection
