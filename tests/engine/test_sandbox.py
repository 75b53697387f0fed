"""Work that crashes, loops or takes all memory costs its own process and nobody else's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.engine import sandbox as sandbox_module
from autotp_serving.engine import sandbox_helper
from autotp_serving.engine.chat_template import ChatTemplate
from autotp_serving.engine.sandbox import Sandbox
from autotp_serving.engine.sandbox_helper import (
    RefusalError,
    SandboxBusyError,
    SandboxError,
    cpu_seconds,
)
from autotp_serving.engine.sandbox_worker import NICENESS
from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.structured_output import StructuredOutput, structure_to_plain
from tests.fakes import ByteTokenizer

NUM_WORKERS = sum(sandbox_module.KINDS.values())
ROOT = Path(__file__).parents[2]
TEMPLATE = """{% if k == 'loop' %}{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}
{% endfor %}{% elif k == 'memory' %}{{ 'a' * 10 ** 10 }}{% elif k == 'long' %}{{ 'a' * 5000 }}
{% elif k == 'zero' %}{{ 1 // 0 }}{% elif k == 'refuse' %}{{ raise_exception('not so') }}
{% elif k == 'recur' %}{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}
{% else %}{{ messages[0].content }}{% endif %}"""


class TemplateTokenizer(ByteTokenizer):
    """Bytes, and a chat template."""

    def __init__(self) -> None:
        super().__init__()
        self.template = ChatTemplate({"default": TEMPLATE}, {"bos_token": "<s>"})


def render(sandbox: Sandbox, k: str = "", seconds: float = 0.5) -> Any:
    data = ([{"role": "user", "content": "hi"}], {"k": k}, 1000)
    return sandbox.submit("render", data, 1, seconds).result(60)


def children(pid: int) -> list[int]:
    """Processes that another has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def sockets(pid: int) -> list[str]:
    """Names of a process's sockets."""
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            names.append(os.readlink(link))
    return [name for name in names if name.startswith("socket:")]


def wait_until(check: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A helper that has begun in an environment like a rank's, beside a socket that listens."""
    environ = {"PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "RANK": "0", "AUTOTP_API_KEY": "k"}
    before = {name: os.environ.get(name) for name in environ}
    os.environ.update(environ)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)  # even if somebody were that careless
        one = Sandbox(TemplateTokenizer())
        one.start().result(60)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        yield one
    one.close()


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        ("loop", SandboxError, "took longer than 0.5 s"),
        ("memory", SandboxError, "needs more than 256 MiB of memory"),
        ("zero", RefusalError, "ZeroDivisionError"),
        ("refuse", RefusalError, "^not so$"),
        ("recur", RefusalError, "too deep"),
    ],
)
def test_a_template_that_does_not_end_well(
    sandbox: Sandbox, k: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        render(sandbox, k)
    assert render(sandbox).strip() == "hi"


def test_a_prompt_too_long_is_not_handed_over(sandbox: Sandbox) -> None:
    assert render(sandbox, "long") > 5000


def test_a_grammar_that_overflows_the_stack(sandbox: Sandbox) -> None:
    rules = "\n".join(f'r{number}: "a" r{number + 1} "b"' for number in range(5000))
    structured_output = StructuredOutput("grammar", f'start: r0\n{rules}\nr5000: "x"')
    job = sandbox.submit("grammar", structure_to_plain(structured_output), 1, 5.0)
    with pytest.raises(SandboxError, match="too deep"):
        job.result(60)
    job = sandbox.submit("grammar", structure_to_plain(StructuredOutput("regex", "a+")), 1, 5.0)
    assert job.result(60)["text"]


def test_a_worker_that_is_killed_is_replaced(sandbox: Sandbox) -> None:
    helper = sandbox._helper._process.pid
    wait_until(lambda: len(children(helper)) == NUM_WORKERS)
    before = {pid: cpu_seconds(pid) for pid in children(helper)}
    job = sandbox.submit("render", ([], {"k": "loop"}, 9), 1, 30.0)

    def busy() -> list[int]:
        spent = {pid: cpu_seconds(pid) - before[pid] for pid in before}
        return [pid for pid in spent if spent[pid] > 0.2]

    wait_until(busy)
    for pid in busy():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(SandboxError):
        job.result(10)
    assert render(sandbox).strip() == "hi"
    wait_until(lambda: len(children(helper)) == NUM_WORKERS)


def test_a_long_job_is_sent_further_back_and_the_next_is_not(sandbox: Sandbox) -> None:
    """With the lowest priority from the start, short jobs came to nothing on a busy machine."""
    helper = sandbox._helper._process.pid

    def nicenesses() -> list[int]:
        found = []
        for pid in children(helper):
            with contextlib.suppress(ProcessLookupError):
                found.append(os.getpriority(os.PRIO_PROCESS, pid))
        return found

    wait_until(lambda: set(nicenesses()) == {NICENESS} and len(nicenesses()) == NUM_WORKERS)
    job = sandbox.submit("render", ([], {"k": "loop"}, 9), 1, 1.5)
    wait_until(lambda: 19 in nicenesses())
    with pytest.raises((SandboxError, SandboxBusyError)):
        job.result(20)
    wait_until(lambda: set(nicenesses()) == {NICENESS} and len(nicenesses()) == NUM_WORKERS)


def test_helpers_stand_back_and_have_nothing_of_a_rank(sandbox: Sandbox) -> None:
    helper = sandbox._helper._process.pid
    num_seen = 0
    ours = set(sockets(os.getpid()))
    for pid in (helper, *children(helper)):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # just replaced
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {one.partition(b"=")[0].decode() for one in variables}
            theirs = set(sockets(pid))
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert os.getpriority(os.PRIO_PROCESS, pid) >= NICENESS
            assert not names & {"PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "AUTOTP_API_KEY"}
            assert not theirs & ours
            assert len(theirs) <= 2  # the one at which workers wait, and a job's
            assert "libtorch" not in maps and "libmpi" not in maps
            num_seen += 1
    assert num_seen >= 2


def test_a_helper_that_is_killed_is_replaced_and_its_job_done(sandbox: Sandbox) -> None:
    helper = sandbox._helper._process.pid
    workers = children(helper)
    os.kill(helper, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, workers)))
    assert render(sandbox).strip() == "hi"
    assert sandbox._helper._process.pid != helper


def test_helpers_end_with_the_process_that_started_them() -> None:
    """Even if that is killed while a worker loops."""
    code = (
        "from tests.engine.test_sandbox import *\n"
        "sandbox = Sandbox(TemplateTokenizer())\n"
        "sandbox.start().result(60)\n"
        "sandbox.submit('render', ([], {'k': 'loop'}, 9), 1, 600.0)\n"
        "helper = sandbox._helper._process.pid\n"
        "print(helper, *children(helper), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) > 1 and all(map(is_alive, pids))
        time.sleep(0.3)
        process.kill()
    wait_until(lambda: not any(map(is_alive, pids)), 5.0)


def test_closing_ends_all() -> None:
    one = Sandbox(TemplateTokenizer())
    one.start().result(60)
    helper = one._helper._process.pid
    workers = children(helper)
    one.close()
    wait_until(lambda: not any(map(is_alive, [helper, *workers])), 5.0)
    with pytest.raises(SandboxBusyError):
        render(one)


def test_closing_before_the_helper_is_ready_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    one = Sandbox(TemplateTokenizer())
    ready = one.start()
    wait_until(lambda: one._helper is not None)
    one.close()
    with pytest.raises(SandboxBusyError):
        ready.result(60)
    assert not caplog.records


def test_a_helper_that_loads_for_too_long_is_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every later job failed, since the helper's setup had been handed over already."""
    one = Sandbox(TemplateTokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_helper, "START_SECONDS", 0.01)
        with pytest.raises(SandboxBusyError):
            one.start().result(60)
    assert render(one, seconds=5.0).strip() == "hi"
    one.close()


def test_a_job_that_waited_too_long_is_refused(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "MAX_WAIT_SECONDS", -1.0)
    with pytest.raises(SandboxBusyError):
        render(sandbox)


def test_small_work_passes_large() -> None:
    threads = ShortestFirst(1, "test")
    gate = threading.Event()
    done: list[int] = []
    jobs = [threads.submit(0, gate.wait)]
    jobs += [threads.submit(size, lambda size=size: done.append(size)) for size in (9, 3, 5, 1)]
    gate.set()
    for job in jobs:
        job.result(10)
    assert done == [1, 3, 5, 9]


def test_a_panic_reaches_the_one_who_asked_and_ends_no_thread() -> None:
    class PanicException(BaseException):
        pass

    def fail() -> None:
        raise PanicException("entered unreachable code")

    threads = ShortestFirst(1, "test")
    with pytest.raises(PanicException):
        threads.submit(1, fail).result(10)
    assert threads.submit(1, lambda: 7).result(10) == 7
