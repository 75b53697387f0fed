"""The engine over a runner in another place: nothing is lost on the way, nor with the ranks."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from autotp_serving.batch import SampleInput
from autotp_serving.head.rank_side import run_steps
from autotp_serving.head.runner import RemoteRunner
from autotp_serving.head.wire import Line, LineClosed, Ready, SampleReader, SampleWriter
from autotp_serving.request import SamplingParams
from tests.engine.test_engine import Bench, wait_for
from tests.fakes import FakeRunner

REQUESTS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "logprobs": 2},
    "unseeded": {"temperature": 0.8, "top_k": 5},
    "penalized": {"temperature": 1.0, "frequency_penalty": 0.5, "logit_bias": {97: -5.0}},
    "scored": {"prompt_logprobs": 3, "logprobs": 0},
    "held": {"min_tokens": 9, "stop": ("q",)},
}
NUM_TOKENS = 24


@pytest.fixture(params=[1, 2], autouse=True)
def max_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "max_in_flight", request.param)


class Ranks:
    """Groups of ranks, one after another: each a thread with a fresh runner at a socket's end."""

    def __init__(self) -> None:
        self.remote = RemoteRunner()
        self.runner = FakeRunner()
        self.epoch = self.num_slots = 0
        self.mistakes: list[AssertionError] = []
        self._ends: list[socket.socket] = []
        self.attach()

    def attach(self, num_blocks: int = 64, block_size: int = 16) -> None:
        """Start the next group and give it to the remote runner."""
        self.epoch += 1
        files = self.runner.files
        self.runner = FakeRunner(num_blocks, block_size)
        self.runner.files = files
        held = {slot: key for slot, (key, _) in files.items()}
        stored = [(slot, held.get(slot, b"")) for slot in range(self.num_slots)]
        self.runner.stored_blocks = stored
        ours, theirs = socket.socketpair()
        self._ends += [ours, theirs]
        threading.Thread(target=self._serve, args=(Line(theirs), self.runner), daemon=True).start()
        can_draft = self.runner.can_draft
        sizes = num_blocks, block_size, self.runner.max_in_flight
        ready = Ready(*sizes, False, can_draft, 512, 257, "cpu", stored)
        self.remote.attach(Line(ours), ready, self.epoch)

    def _serve(self, line: Line, runner: FakeRunner) -> None:
        try:
            run_steps(line, runner)
        except LineClosed:
            pass
        except AssertionError as error:
            self.mistakes.append(error)
        except RuntimeError:  # the step at which it is to fail
            pass
        finally:  # as at the end of its process
            with contextlib.suppress(OSError):  # closed by the test
                line.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self._ends:
            end.close()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    groups = Ranks()
    yield groups
    groups.close()
    assert not groups.mistakes


def submit_all(bench: Bench) -> None:
    for name, params in REQUESTS.items():
        bench.submit(
            name, prompt=f"{name}, and the beginning of all", max_tokens=NUM_TOKENS, **params
        )


def run(bench: Bench) -> None:
    while bench.engine.has_work:
        bench.engine.step()
        assert bench.engine.outage is None


def run_until_lost(bench: Bench) -> None:
    while bench.engine.outage is None:
        assert bench.engine.has_work
        bench.engine.step()


def collect_all(bench: Bench) -> dict[str, object]:
    """Of each request all that its client sees, joined."""
    found = {}
    for name in REQUESTS:
        outputs = bench.outputs(name)
        logprobs = [one for output in outputs for one in output.logprobs]
        scores = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
        reason = bench.last(name).finish_reason
        found[name] = (bench.text(name), bench.tokens(name), logprobs, scores, reason)
    return found


@pytest.fixture
def expected() -> dict[str, object]:
    bench = Bench(max_num_seqs=4, max_num_batched_tokens=40)
    submit_all(bench)
    bench.run()
    return collect_all(bench)


def test_an_engine_over_a_line_gives_what_one_without_gives(ranks, expected):
    bench = Bench(ranks.remote, max_num_seqs=4, max_num_batched_tokens=40)
    submit_all(bench)
    run(bench)
    assert collect_all(bench) == expected
    bench.submit("last")  # a step takes along what is to be forgotten
    run(bench)
    assert ranks.runner.kept <= {"", "last"}, "plain requests go without a name"
    assert len(bench.engine.rank_times) == 2


@pytest.mark.parametrize("fail_at_step", [0, 1, 5, 17])
def test_streams_go_on_where_they_stood_when_the_ranks_are_lost(ranks, expected, fail_at_step):
    """The runner of each group asserts that it is told all that it needs."""
    bench = Bench(ranks.remote, max_num_seqs=4, max_num_batched_tokens=40)
    ranks.runner.fail_at_step = fail_at_step
    submit_all(bench)
    for _ in range(2):
        run_until_lost(bench)
        bench.engine.scheduler.check_integrity()
        assert bench.engine.stats().num_held_blocks == 0
        bench.engine.step()  # nothing runs meanwhile
        bench.engine.resume(ranks.attach)
        bench.engine.lose("late news of the group before")
        bench.engine.resume(ranks.attach)
        bench.engine.step()
        assert bench.engine.outage is None
        ranks.runner.fail_at_step = fail_at_step + 3
    ranks.runner.fail_at_step = None
    run(bench)
    assert collect_all(bench) == expected
    assert bench.engine.stats().num_restarts == 4


def test_blocks_in_files_outlive_the_ranks(ranks):
    ranks.num_slots = 64
    ranks.attach()
    bench = Bench(ranks.remote)
    bench.submit("a", prompt="x" * 100, max_tokens=4)
    run(bench)
    bench.engine.step()  # stores what steps had no time for
    bench.engine.lose("rank 1 has died")
    bench.engine.resume(ranks.attach)
    bench.submit("b", prompt="x" * 100, max_tokens=4)
    bench.engine.step()
    run(bench)
    assert bench.tokens("a") == bench.tokens("b")
    assert bench.engine.stats().num_offload_hit_tokens == 96
    assert len(ranks.runner.files) == 6


def test_a_late_report_is_dropped(ranks):
    """Of another epoch, or of a step that nobody waits for."""
    ours, theirs = socket.socketpair()
    ready = Ready(8, 16, 1, False, False, 512, 257)
    ranks.remote.attach(Line(ours), ready, 5)
    bench = Bench(ranks.remote)
    bench.submit("a", max_tokens=1)
    rank = Line(theirs)
    for epoch, number, token in ((4, 1, 65), (5, 0, 66), (5, 1, 67)):
        rank.send((epoch, number, [], ([[token]], [], [], [])))
    run(bench)
    assert bench.tokens("a") == [67]
    ours.close()
    theirs.close()


def test_those_who_wait_too_long_are_told_and_the_next_are_served(ranks):
    bench = Bench(ranks.remote, recovery_timeout=0.05)
    bench.engine.start()
    bench.submit("a", max_tokens=400)
    wait_for(lambda: bench.tokens("a"))
    bench.engine.lose("rank 1 has died")
    ranks.close()
    bench.submit("waits")
    wait_for(lambda: bench.outputs("waits"))
    for name in ("a", "waits"):
        last = bench.last(name)
        assert (last.finish_reason, last.error_code) == ("error", "recovering")
        assert "rank 1 has died" in last.error and "--recovery-timeout" in last.error
    assert "rank 1 has died" in bench.engine.refusal
    with pytest.raises(Exception, match="rank 1 has died"):
        bench.submit("refused")
    bench.engine.resume(ranks.attach)
    wait_for(lambda: bench.engine.outage is None)
    bench.submit("served", max_tokens=3)
    wait_for(lambda: bench.outputs("served") and bench.last("served").finish_reason == "length")
    assert bench.engine.shutdown()


def test_a_request_that_may_be_the_cause_is_not_tried_for_ever(ranks):
    def attach() -> None:
        ranks.attach()
        ranks.runner.fail_at_step = 0

    bench = Bench(ranks.remote)
    bench.submit("deadly")
    bench.engine.lose("rank 0 has died")  # while nothing ran: nobody's doing
    for _ in range(3):
        bench.engine.resume(attach)
        bench.engine.step()
        run_until_lost(bench)
    bench.engine.resume(ranks.attach)
    bench.engine.step()
    assert "the ranks ended 3 times" in bench.last("deadly").error
    bench.submit("next")
    run(bench)
    assert bench.last("next").finish_reason == "length"


def test_a_pool_that_is_smaller_than_before_ends_what_fits_no_more(ranks):
    bench = Bench(ranks.remote)
    bench.submit("long", prompt="x" * 100, max_tokens=400)
    bench.submit("short", max_tokens=9)
    bench.engine.step()
    bench.engine.lose("rank 0 has died")
    bench.engine.resume(lambda: ranks.attach(num_blocks=8))
    run(bench)
    assert "do not fit" in bench.last("long").error
    assert bench.last("short").finish_reason == "length"


def test_samples_arrive_as_they_were():
    writer, reader = SampleWriter(), SampleReader()
    params = SamplingParams(temperature=0.5, repetition_penalty=1.1, logit_bias={3: -1.5}, seed=9)
    tokens = [5, 6, 7]
    for _ in range(3):
        sample = SampleInput(params, 0.25, "a", tokens, 2, (1, 2), b"\x07", (9, 4))
        (packed,) = writer.pack([sample])
        (read,) = reader.unpack([packed])
        assert read == sample
        tokens.append(8)
    assert packed[5:] == ([8], (9, 4), None), "only what is new is sent"
    writer.release("a")
    assert writer.take_released() == ["a"] and writer.take_released() == []
