"""The helper process of `sandbox`: loads once, forks workers, each does one job at a time.

Started by rank 0 and no rank itself: it has none of its sockets, none of the launcher's
environment, and never imports torch. A worker that crashes or is ended is replaced by a fork, which
takes a millisecond and starts from the same clean state.
"""

from __future__ import annotations

import ctypes
import json
import marshal
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from autotp_serving.engine.chat_template import ChatTemplate, ChatTemplateError
from autotp_serving.engine.grammar import GrammarError, try_structure
from autotp_serving.engine.large_body import find_problem
from autotp_serving.engine.sandbox import KINDS
from autotp_serving.engine.sandbox_helper import REPLY_HEAD
from autotp_serving.engine.vocabulary import Vocabulary
from autotp_serving.structured_output import structure_from_plain

NICENESS = 15
"""At which a job begins. One that takes long is sent further back, see `sandbox_helper`."""

MAX_JOB_BYTES = 256 * 2**20
"""Memory that a job may take beside what the helper holds anyway."""

STACK_BYTES = 8 * 2**20
"""Rank 0 repeats what a grammar's job has done, in threads with several times that."""

MAX_KEPT_BYTES = 8 * 2**20
"""A worker that grew by more is replaced after its job."""

LOAD_SECONDS = 1.0

EXIT_CLOSED = 3

PR_SET_PDEATHSIG = 1

TOO_LARGE = f"needs more than {MAX_JOB_BYTES >> 20} MiB of memory"

Setup = dict[str, Any]
"""`template`: a ChatTemplate's fields or None; `vocabulary`: a Vocabulary's fields."""

Handler = Callable[[Any, list[int]], Any]
"""Does a job, given its data and the descriptors of the files that came with it."""


def main() -> int:
    """Load, then keep as many workers active as may be busy at once."""
    group = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # rank 0 decides when to end
        signal.signal(number, signal.SIG_IGN)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup: Setup = marshal.loads(sys.stdin.buffer.read())
    handlers = make_handlers(setup)
    helper = os.getpid()
    workers: dict[int, float] = {}
    while True:
        while len(workers) < sum(KINDS.values()):
            pid = os.fork()
            if pid == 0:
                end_with_parent(helper)
                os._exit(serve(group, handlers))
            workers[pid] = time.monotonic()
        pid, status = os.wait()
        if os.waitstatus_to_exitcode(status) == EXIT_CLOSED:
            return 0
        if time.monotonic() - workers.pop(pid, 0.0) < 0.01:
            time.sleep(0.05)  # should they all end at once, for whatever reason


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process with the one that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(EXIT_CLOSED)


def make_handlers(setup: Setup) -> dict[str, Handler]:
    """What is done for each kind of job, everything loaded that it needs."""
    handlers: dict[str, Handler] = {
        "ping": lambda data, files: data,
        "body": lambda data, files: find_problem(files[0], *data),
    }
    if setup["template"] is not None:
        template = ChatTemplate(**setup["template"])
        # To compile one may be as much work as to render it: where it is, each job does it anew.
        if ends_well(template.load):
            set_soft_limit(resource.RLIMIT_AS, virtual_bytes() + MAX_JOB_BYTES)
            template.load()
            lift_limits()
        handlers["render"] = lambda data, files: render(template, *data)
    vocabulary = Vocabulary(**setup["vocabulary"])
    vocabulary.load()
    handlers["grammar"] = lambda data, files: try_structure(vocabulary, structure_from_plain(data))
    return handlers


def ends_well(work: Callable[[], None]) -> bool:
    """Try something in a fork of this process, within the limits of a job."""
    pid = os.fork()
    if pid == 0:
        limit(LOAD_SECONDS)
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return status == 0


def render(
    template: ChatTemplate, messages: list[Any], options: dict[str, Any], max_chars: int
) -> str | int:
    """Write out a conversation; of one that is too long, only its length in characters."""
    text = template.render(messages, options)
    return text if len(text) <= max_chars else len(text)


def serve(group: socket.socket, handlers: dict[str, Handler]) -> int:
    """A worker's life; returns its exit code."""
    base = resident_bytes()
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    while True:
        message, descriptors, _, _ = socket.recv_fds(group, 16, 1)
        if not message:
            return EXIT_CLOSED
        with socket.socket(fileno=descriptors[0]) as job:
            job.sendall(REPLY_HEAD.pack(os.getpid()))
            head, files, _, _ = socket.recv_fds(job, REPLY_HEAD.size, 1)
            head += read(job, REPLY_HEAD.size - len(head))
            (size,) = REPLY_HEAD.unpack(head)
            kind, seconds, data = marshal.loads(read(job, size))
            is_spent = False
            try:
                limit(seconds)
                reply = {"answer": handlers[kind](data, files)}
            except (ChatTemplateError, GrammarError) as error:
                reply = {"refusal": str(error)}
            except MemoryError:
                reply = {"failure": TOO_LARGE}
                is_spent = True
            lift_limits()
            for descriptor in files:
                os.close(descriptor)
            text = json.dumps(reply).encode()
            job.sendall(REPLY_HEAD.pack(len(text)) + text)
        del data, reply, text
        was_sent_back = os.getpriority(os.PRIO_PROCESS, 0) > niceness  # for good, as users may not
        if is_spent or was_sent_back or resident_bytes() - base > MAX_KEPT_BYTES:
            return 0


def limit(seconds: float) -> None:
    """Bound memory, stack and processor time of this process from here on."""
    set_soft_limit(resource.RLIMIT_AS, virtual_bytes() + MAX_JOB_BYTES)
    set_soft_limit(resource.RLIMIT_STACK, STACK_BYTES)
    # Rank 0 ends it earlier; this is for the case that rank 0 is no more.
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 1)


def lift_limits() -> None:
    """Undo `limit`."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    set_soft_limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def set_soft_limit(name: int, value: int) -> None:
    """Set a limit of this process that it may lift again, as far as the hard one allows."""
    hard = resource.getrlimit(name)[1]
    if hard != resource.RLIM_INFINITY and (value == resource.RLIM_INFINITY or value > hard):
        value = hard
    resource.setrlimit(name, (value, hard))


def virtual_bytes() -> int:
    """Address space of this process."""
    return _statm(0)


def resident_bytes() -> int:
    """Memory of this process, what it shares included."""
    return _statm(1)


def _statm(field: int) -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()


def read(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; ends the process if there are no more."""
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 2**20))
        if not part:
            os._exit(0)
        data += part
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main())
