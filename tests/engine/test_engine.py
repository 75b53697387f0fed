"""The engine as its callers see it: outputs, ends, refusals, failure, its thread."""

from __future__ import annotations

import random
import threading
import time

import pytest

from autotp_serving.batch import INVALID_TOKEN, SampleInput, StepResult
from autotp_serving.config import ServingConfig
from autotp_serving.engine import Engine, EngineError, QueueFullError
from autotp_serving.engine.sequence import draw_uniform, make_draw_key
from autotp_serving.request import Request, RequestError, RequestOutput, SamplingParams
from tests.fakes import ByteTokenizer, FakeRunner, answers, generate, letters

EOS = ByteTokenizer.EOS


class StuckRunner(FakeRunner):
    """Its steps last until the test lets them go."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def forward(self, batch):
        self.released.wait(20)
        raise RuntimeError("the sum was interrupted")


class Bench:
    """An engine with a fake runner, and all outputs it gave, by request."""

    def __init__(
        self,
        runner: FakeRunner | None = None,
        tokenizer: ByteTokenizer | None = None,
        max_model_len: int = 512,
        **settings,
    ) -> None:
        self.failures: list[str] = []
        self.steps: list[list[RequestOutput]] = []
        self.runner = runner or FakeRunner()
        self.engine = Engine(
            self.runner,
            tokenizer or ByteTokenizer(),
            ServingConfig(model_path="fake", **settings),
            max_model_len,
            self.steps.append,
            self.failures.append,
        )

    def submit(
        self, name: str, prompt: str = "hi", tenant: str = "", grammar=None, **params
    ) -> None:
        tokens = tuple(ByteTokenizer().encode(prompt))
        sampling = SamplingParams(**params)
        arrival = time.monotonic()
        self.engine.submit(Request(name, tokens, sampling, arrival, tenant, grammar=grammar))

    def run(self) -> None:
        while self.engine.has_work:
            self.engine.step()
            self.engine.scheduler.check_integrity()

    def outputs(self, name: str) -> list[RequestOutput]:
        return [output for step in list(self.steps) for output in step if output.request_id == name]

    def text(self, name: str) -> str:
        return "".join(output.text for output in self.outputs(name))

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs(name) for token in output.token_ids]

    def last(self, name: str) -> RequestOutput:
        """The last output, which alone has a finish reason."""
        *before, last = self.outputs(name)
        assert all(output.finish_reason is None for output in before)
        assert last.finish_reason is not None
        return last

    def assert_clean(self) -> None:
        """Nothing is left of any request."""
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_held_blocks) == (0, 0, 0)
        assert not self.engine.has_work
        assert self.engine._output_processor.is_empty and not self.runner.kept
        self.engine.scheduler.check_integrity()


@pytest.fixture
def threaded():
    """Makes benches with a running thread, and ends their threads."""
    benches: list[Bench] = []

    def start(*args, **settings) -> Bench:
        benches.append(Bench(*args, **settings))
        benches[-1].engine.start()
        return benches[-1]

    yield start
    for bench in benches:
        assert bench.engine.shutdown()


def wait_for(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def test_each_request_has_its_own_length_and_one_output_per_token():
    bench = Bench(max_num_seqs=3)
    for num in range(1, 9):
        bench.submit(str(num), prompt="x" * num, max_tokens=num)
    bench.run()
    for num in range(1, 9):
        outputs = bench.outputs(str(num))
        assert [output.num_output_tokens for output in outputs] == list(range(1, num + 1))
        assert all(len(output.token_ids) == 1 for output in outputs)
        assert bench.last(str(num)).finish_reason == "length"
        assert bench.tokens(str(num)) == generate(b"x" * num, [SampleInput(SamplingParams())] * num)
        assert bench.text(str(num)) == bytes(bench.tokens(str(num))).decode()
        assert bench.last(str(num)).num_prompt_tokens == num
    bench.assert_clean()


def test_a_turn_without_a_step_is_not_the_last_step():
    bench = Bench()
    bench.submit("a", max_tokens=2)
    bench.run()
    lasted = bench.engine.stats().last_step_seconds
    bench.engine.step()
    assert lasted > 0 and bench.engine.stats().last_step_seconds == lasted


def test_end_token_ends_the_text_and_is_counted_but_has_no_text():
    bench = Bench(FakeRunner(next_token=answers({"hi": "né 🎉"})))
    bench.submit("a", max_tokens=50)
    bench.run()
    assert bench.text("a") == "né 🎉"
    last = bench.last("a")
    assert (last.finish_reason, last.token_ids) == ("stop", (EOS,))
    assert last.num_output_tokens == len("né 🎉".encode()) + 1
    bench.assert_clean()


def test_ignore_eos_goes_on_to_the_length_asked_for():
    bench = Bench(FakeRunner(next_token=answers({"hi": "ab"})))
    bench.submit("a", max_tokens=6, ignore_eos=True)
    bench.run()
    assert bench.tokens("a") == [97, 98, EOS, EOS, EOS, EOS]
    assert (bench.text("a"), bench.last("a").finish_reason) == ("ab", "length")


@pytest.mark.parametrize("max_tokens", [50, 11])
def test_stop_string_ends_a_request_and_is_cut(max_tokens):
    """Also when the token that completes it is the last one allowed."""
    bench = Bench(FakeRunner(next_token=answers({"hi": "one STOPtwo"})))
    bench.submit("a", max_tokens=max_tokens, stop=("STOPt", "none"))
    bench.submit("b", prompt="other", max_tokens=20)
    bench.run()
    assert bench.text("a") == "one "
    last = bench.last("a")
    assert (last.finish_reason, last.num_output_tokens) == ("stop", len("one STOPt"))
    assert bench.last("b").num_output_tokens == 20
    assert bench.engine.stats().num_finished == {"stop": 1, "length": 1, "abort": 0, "error": 0}
    bench.assert_clean()


def test_stop_string_completed_by_the_last_token_allowed_is_a_stop():
    bench = Bench(FakeRunner(next_token=answers({"hi": "one STOP"})))
    bench.submit("a", max_tokens=len("one STOP"), stop=("STOP",))
    bench.run()
    assert (bench.text("a"), bench.last("a").finish_reason) == ("one ", "stop")
    assert bench.engine.stats().num_finished["stop"] == 1


def test_text_held_back_for_a_stop_string_is_given_at_the_end():
    bench = Bench(FakeRunner(next_token=answers({"hi": "one ST"})))
    bench.submit("eos", max_tokens=50, stop=("STOP",))
    bench.submit("length", max_tokens=5, stop=("STOP",))
    bench.run()
    assert bench.text("eos") == "one ST"
    assert bench.text("length") == "one S"


@pytest.mark.parametrize("max_num_batched_tokens", [3, 5, 16, 1024])
def test_outputs_do_not_depend_on_chunks_batches_or_the_prefix_cache(max_num_batched_tokens):
    rng = random.Random(0)
    prompts = ["shared beginning " * 3 + "x" * rng.randrange(40) for _ in range(12)]
    params = [{"temperature": 1.0, "seed": n} if n % 2 else {} for n in range(12)]
    for enable_prefix_caching in (False, True):
        bench = Bench(
            FakeRunner(num_blocks=14),
            max_num_seqs=3,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        for n, prompt in enumerate(prompts):
            bench.submit(str(n), prompt=prompt, max_tokens=60, **params[n])
        bench.run()
        for n, prompt in enumerate(prompts):
            key = make_draw_key(n, 0, 0)
            sampling = SamplingParams(**params[n])
            samples = [SampleInput(sampling, draw_uniform(key, at)) for at in range(60)]
            assert bench.tokens(str(n)) == generate(prompt.encode(), samples)
        assert bench.engine.stats().num_preemptions > 0
        assert (bench.engine.stats().num_prefix_hit_tokens > 0) == enable_prefix_caching
        bench.assert_clean()


def test_requests_without_a_seed_repeat_with_the_servers_seed():
    def texts(seed: int) -> list[str]:
        bench = Bench(seed=seed)
        for name in "ab":
            bench.submit(name, temperature=1.0, max_tokens=20)
        bench.run()
        return [bench.text(name) for name in "ab"]

    first = texts(0)
    assert first[0] != first[1]
    assert texts(0) == first
    assert set(texts(1)).isdisjoint(first)


def test_requests_that_are_too_long_are_refused_with_both_numbers():
    bench = Bench(max_model_len=65)
    with pytest.raises(RequestError, match=r"50 tokens of prompt and 16 of completion.* 65 tokens"):
        bench.submit("a", prompt="x" * 50, max_tokens=16)
    bench.submit("b", prompt="x" * 50, max_tokens=15)
    bench.run()
    assert bench.last("b").finish_reason == "length"


def test_requests_that_can_never_fit_in_the_cache_are_refused():
    bench = Bench(FakeRunner(num_blocks=4))
    with pytest.raises(RequestError, match="do not fit in the KV cache of 64 tokens"):
        bench.submit("a", prompt="x" * 60, max_tokens=6)
    bench.submit("b", prompt="x" * 60, max_tokens=5)
    bench.run()
    assert bench.last("b").finish_reason == "length"


def test_queue_limit_counts_at_arrival_and_frees_with_the_last_output():
    bench = Bench(max_num_seqs=2, max_queue_len=3)
    for num in range(5):
        bench.submit(str(num), max_tokens=2)
    with pytest.raises(QueueFullError):
        bench.submit("5", max_tokens=2)
    assert bench.engine.stats().num_waiting == 5
    bench.engine.step()
    assert (bench.engine.stats().num_running, bench.engine.stats().num_waiting) == (2, 3)
    bench.engine.step()
    bench.submit("6", max_tokens=2)
    bench.run()
    assert not bench.outputs("5")
    assert bench.last("6").finish_reason == "length"


def test_request_ids_are_unique_among_the_living():
    bench = Bench()
    bench.submit("a", max_tokens=1)
    with pytest.raises(ValueError, match="in use"):
        bench.submit("a", max_tokens=1)
    bench.run()
    bench.submit("a", max_tokens=1)
    bench.run()
    assert len(bench.outputs("a")) == 2


@pytest.mark.parametrize("num_steps", [0, 1, 3, 8])
def test_abort_frees_blocks_before_the_next_step(num_steps):
    """Before it was seen, in the middle of its prompt, while it streams, while it waits."""
    bench = Bench(max_num_seqs=2, max_num_batched_tokens=20)
    bench.submit("victim", prompt="v" * 100, max_tokens=100)
    bench.submit("waits", prompt="w", max_tokens=100)
    bench.submit("late", prompt="l", max_tokens=100)
    for _ in range(num_steps):
        bench.engine.step()
    bench.engine.abort("victim")
    bench.engine.abort("late")
    bench.engine.abort("unknown")
    bench.engine.step()
    assert [seq.request_id for seq in bench.engine.scheduler.running] == ["waits"]
    for name in ("victim", "late"):
        assert bench.last(name).finish_reason == "abort"
    bench.engine.abort("victim")
    bench.engine.abort("waits")
    bench.engine.step()
    assert len([o for o in bench.outputs("victim") if o.finish_reason]) == 1
    bench.assert_clean()
    assert bench.engine.stats().num_finished["abort"] == 3


def test_all_outputs_of_a_step_come_in_one_call_and_none_without_outputs():
    bench = Bench(max_num_seqs=4, max_num_batched_tokens=4)
    for name in "abcd":
        bench.submit(name, prompt="x", max_tokens=3)
    bench.run()
    bench.submit("long", prompt="y" * 16, max_tokens=1)
    bench.run()
    bench.engine.step()
    assert [len(step) for step in bench.steps] == [4, 4, 4, 1]


def test_failing_runner_ends_every_request_with_the_error_and_refuses_more(max_in_flight):
    bench = Bench(FakeRunner(fail_at_step=2), max_num_seqs=2)
    for name in "abc":
        bench.submit(name, max_tokens=9)
    for _ in range(3 - max_in_flight):
        bench.engine.step()
    bench.submit("unseen", max_tokens=9)
    with pytest.raises(EngineError, match="rank 1 is gone"):
        bench.engine.step()
    for name in ("a", "b", "c", "unseen"):
        last = bench.last(name)
        assert last.finish_reason == "error" and "rank 1 is gone" in last.error
    assert bench.last("a").num_output_tokens == 3 - max_in_flight
    assert bench.failures == [bench.engine.failure] == [last.error]
    with pytest.raises(EngineError, match="rank 1 is gone"):
        bench.submit("d", max_tokens=1)
    with pytest.raises(EngineError):
        bench.engine.step()
    bench.assert_clean()


def test_requests_stopped_in_the_step_that_fails_to_decode_still_end_once():
    class Broken(ByteTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            if len(token_ids) > 3:
                raise ValueError("bad token\nwith a second line")
            return super().decode(token_ids)

    bench = Bench(tokenizer=Broken())
    bench.submit("a", max_tokens=2)
    bench.submit("b", max_tokens=2)
    with pytest.raises(EngineError, match=r"bad token$"):
        bench.run()
    assert [bench.last(name).finish_reason for name in "ab"] == ["error", "error"]
    bench.assert_clean()


def test_failure_is_reported_even_if_outputs_cannot_be_delivered():
    """And what may have been delivered is not given out a second time."""
    calls: list[list[str]] = []

    def refuse(outputs):
        calls.append([output.request_id for output in outputs])
        raise RuntimeError("event loop is closed")

    failures: list[str] = []
    config = ServingConfig(model_path="fake")
    engine = Engine(FakeRunner(), ByteTokenizer(), config, 64, refuse, failures.append)
    engine.submit(Request("a", (1, 2), SamplingParams(max_tokens=1), 0.0))
    engine.submit(Request("b", (1, 2), SamplingParams(max_tokens=2), 0.0))
    with pytest.raises(EngineError):
        engine.step()
    assert calls == [["a", "b"], ["b"]]
    assert failures == ["the engine failed: RuntimeError: event loop is closed"]


def test_invalid_logits_end_that_request_alone():
    def next_token(context, sample):
        return INVALID_TOKEN if context[:1] == [ord("n")] and len(context) > 4 else 65

    bench = Bench(FakeRunner(next_token=next_token))
    bench.submit("nan", prompt="nan", max_tokens=9)
    bench.submit("ok", prompt="ok", max_tokens=9)
    bench.run()
    last = bench.last("nan")
    assert last.finish_reason == "error" and "NaN" in last.error
    assert (last.token_ids, last.num_output_tokens, bench.text("nan")) == ((), 2, "AA")
    assert bench.text("ok") == "A" * 9
    assert bench.engine.failure is None and bench.failures == []
    assert bench.engine.stats().num_generated_tokens == 11
    assert bench.engine.stats().num_prompt_tokens == 5
    bench.assert_clean()


def test_thread_serves_many_callers_and_sleeps_when_idle(threaded):
    bench = threaded(max_num_seqs=4, max_num_batched_tokens=64)
    names = [f"{caller}-{n}" for caller in range(4) for n in range(10)]

    def call(caller: int) -> None:
        for n in range(10):
            bench.submit(f"{caller}-{n}", prompt=f"prompt {caller}", max_tokens=1 + n)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    wait_for(lambda: not bench.engine.has_work and bench.engine.stats().num_held_blocks == 0)
    time.sleep(0.02)
    for name in names:
        assert bench.last(name).num_output_tokens == 1 + int(name.split("-")[1])
    bench.assert_clean()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02


def test_abort_while_a_step_runs_takes_effect_after_that_step(threaded):
    bench = threaded(FakeRunner(delay=0.03))
    bench.submit("a", max_tokens=400)
    wait_for(lambda: bench.outputs("a"))
    bench.engine.abort("a")
    wait_for(lambda: bench.outputs("a")[-1].finish_reason == "abort", seconds=2.0)
    assert bench.engine.stats().num_held_blocks == 0


def test_shutdown_drains_then_aborts_the_rest(threaded):
    bench = threaded(FakeRunner(delay=0.005), max_num_seqs=2)
    bench.submit("short", max_tokens=3)
    bench.submit("long", max_tokens=400)
    bench.submit("waits", max_tokens=400)
    assert bench.engine.shutdown(drain_seconds=0.4)
    assert bench.last("short").finish_reason == "length"
    assert bench.last("long").finish_reason == "abort" and bench.last("long").num_output_tokens > 3
    assert bench.last("waits").finish_reason == "abort"
    with pytest.raises(EngineError, match="shutting down"):
        bench.submit("more")
    bench.assert_clean()


def test_shutdown_of_an_idle_engine_is_immediate(threaded):
    bench = threaded()
    started = time.monotonic()
    assert bench.engine.shutdown(drain_seconds=30.0)
    assert time.monotonic() - started < 1.0


def test_shutdown_without_a_thread_ends_what_is_alive():
    bench = Bench()
    bench.submit("a", max_tokens=3)
    assert bench.engine.shutdown(drain_seconds=5.0)
    assert bench.last("a").finish_reason == "length"
    bench = Bench()
    bench.submit("b", max_tokens=3)
    bench.engine.shutdown()
    assert bench.last("b").finish_reason == "abort"


def test_failure_in_the_thread_reaches_the_owner(threaded):
    bench = threaded(FakeRunner(fail_at_step=3))
    bench.submit("a", max_tokens=400)
    wait_for(lambda: bench.failures)
    assert "rank 1 is gone" in bench.last("a").error
    with pytest.raises(EngineError):
        bench.submit("b")


def test_a_step_costs_little_besides_the_model():
    """Twice the budget of 200 microseconds, as other programs share the machine."""

    class Instant(FakeRunner):
        def forward(self, batch):
            pass

        def sample(self, samples, scores=(), pools=()):
            self.results = [*getattr(self, "results", []), StepResult([[65]] * len(samples))]

        def collect(self):
            return self.results.pop(0)

    class Silent(ByteTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            return ""

    bench = Bench(Instant(num_blocks=1024), Silent())
    for num in range(8):
        bench.submit(str(num), prompt="x" * 100, max_tokens=300)
    bench.engine.step()
    costs = []
    while bench.engine.has_work:
        bench.engine.step()
        costs.append(bench.engine.stats().last_step_seconds)
    assert sorted(costs)[len(costs) // 2] < 400e-6


def test_fake_model_depends_on_all_tokens_and_the_draw():
    """The tests above compare outputs: they would prove nothing with a constant model."""
    greedy, random_ = SamplingParams(), SamplingParams(temperature=1.0)
    contexts = [[1, 2, 3], [9, 2, 3], [1, 9, 3], [1, 2, 9], [1, 2, 3, 4], [3, 2, 1]]
    assert len({letters(context, SampleInput(greedy)) for context in contexts}) > 2
    sampled = [letters([1], SampleInput(random_, n / 9)) for n in range(9)]
    assert len(set(sampled)) > 4


def test_a_failure_from_outside_counts_though_a_step_never_ends(threaded) -> None:
    """A host lost while the engine waited for it inside a collective left it failing never."""
    runner = StuckRunner()
    bench = threaded(runner=runner)
    bench.submit("caught")
    bench.engine.fail("rank 1 on host beta is lost")
    sentence = "the engine failed: rank 1 on host beta is lost"
    assert bench.engine.failure == sentence
    with pytest.raises(EngineError, match="host beta is lost"):
        bench.submit("late")
    runner.released.set()  # and what the step then says comes second
    bench.engine._thread.join(10.0)
    assert bench.engine.failure == sentence
