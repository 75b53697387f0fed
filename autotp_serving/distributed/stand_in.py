"""The process that the launcher knows as a rank, and ends without a word. Every rank of several.

When one rank dies, or at a second Ctrl+C, `mpirun` kills all others within a millisecond: rank 0
could not tell its clients why their answers stop, and no line would say which rank it was. So each
rank runs as the child of a small process that stands in for it before the launcher: it passes
signals on, says by which signal the rank ended, and lets the others a moment to end their streams.
A rank whose stand-in was killed goes on for that moment, and then ends by itself.

As a program (`python -I -S distributed/stand_in.py RANK PID`) this is that process; standard
library only, and little of it, since it stays for as long as the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

LAST_WORDS_SECONDS = 3.0
"""What the other ranks get, after one has died, to end what they are doing."""

FOLLOWER_SECONDS = 0.5

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
             signal.SIGUSR2)  # fmt: skip


class StandIn:
    """The process that stands in for this one, as seen from the rank; perhaps there is none.

    Args:
        alive: a file descriptor that is at its end once that process has died; None without one.

    Attributes:
        on_end: called then, in a thread of its own; the rank ends `LAST_WORDS_SECONDS` later at
            the latest.
    """

    def __init__(self, alive: int | None) -> None:
        self.on_end: Callable[[], None] = end_soon
        if alive is not None:
            threading.Thread(target=self._watch, args=(alive,), daemon=True).start()

    def _watch(self, alive: int) -> None:
        # A signal that this thread took would not wake the main thread, which handles it.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        os.read(alive, 1)
        try:
            self.on_end()
        finally:  # its words may find no reader any more
            time.sleep(LAST_WORDS_SECONDS)
            os._exit(1)


def end_soon() -> None:
    """Leave without a word, a little after rank 0 has had to notice the same."""
    time.sleep(FOLLOWER_SECONDS)
    os._exit(1)


def part_from_launcher(rank: int) -> StandIn:
    """Go on as the child of a process that stands in for this one; before anything is loaded."""
    alive_reader, alive_writer = os.pipe()
    pid = os.fork()
    if pid:
        # The same process to the launcher; no copy of what is imported, nor of the environment,
        # by which ranks are found.
        os.set_inheritable(alive_writer, True)
        os.execve(sys.executable, [sys.executable, "-I", "-S", __file__, str(rank), str(pid)], {})
    os.close(alive_writer)
    os.setpgid(0, 0)  # launchers kill the whole group of the process that they know
    _wake_with_parent()
    return StandIn(alive_reader)


def _wake_with_parent() -> None:
    """Have a rank that was stopped (SIGSTOP) go on when its stand-in dies, and so end."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGCONT)


def name_signal(number: int) -> str:
    """A signal as people know it, "9 (SIGKILL)"."""
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)


def stand_in(rank: int, pid: int) -> int:
    """Wait for the rank, passing on what the launcher sends. Returns or dies as the rank did."""

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)  # one that is stopped would not hear

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    # The launcher's connections stay open here too: at their end it takes the rank for dead.
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED | os.WCONTINUED)
        if os.WIFSTOPPED(status):
            say(f"rank {rank} is stopped by signal {name_signal(os.WSTOPSIG(status))}")
        elif os.WIFCONTINUED(status):
            say(f"rank {rank} goes on")
        elif os.WIFSIGNALED(status):
            break
        else:
            return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    say(f"rank {rank} was ended by signal {name_signal(number)}")
    for one in PASSED_ON:
        signal.signal(one, signal.SIG_DFL)
    if number not in PASSED_ON:  # nobody asked for it: a fault, or memory had run out
        time.sleep(LAST_WORDS_SECONDS)
    if number == signal.SIGKILL or number in PASSED_ON:
        os.kill(os.getpid(), number)
    return 128 + number  # a second core dump would tell nothing


def say(message: str) -> None:
    """A line of the log, as far as there is one without the package."""
    os.write(2, f"WARNING:  {message}\n".encode())


if __name__ == "__main__":
    sys.exit(stand_in(int(sys.argv[1]), int(sys.argv[2])))
