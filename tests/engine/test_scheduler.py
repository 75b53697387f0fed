"""Who runs when: chunks, order, room, ends. Every batch is run by the checking fake runner."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import pytest

from autotp_serving.batch import INVALID_TOKEN, SampleInput
from autotp_serving.config import ServingConfig
from autotp_serving.engine import shared_prefill
from autotp_serving.engine.scheduler import Scheduler, Step
from autotp_serving.engine.sequence import Sequence, draw_uniform, make_draw_key
from autotp_serving.request import Request, RequestError, SamplingParams
from tests.fakes import ByteTokenizer, FakeRunner, generate

EOS = ByteTokenizer.EOS


class Bench:
    """A scheduler and a runner; `step` does what the engine does."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        next_token=None,
        has_states: bool = False,
        **settings,
    ):
        self.runner = FakeRunner(num_blocks, block_size)
        self.runner.has_states = has_states
        if next_token is not None:
            self.runner.next_token = next_token
        self.in_flight: deque[Step] = deque()
        self.scheduler = Scheduler(
            ServingConfig(model_path="fake", **settings),
            num_blocks,
            block_size,
            frozenset({EOS}),
            has_states=has_states,
        )

    def add(self, name: str, prompt: int | list[int], **params) -> Sequence:
        tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
        request = Request(name, tuple(tokens), SamplingParams(**params), 0.0)
        self.scheduler.check_fits(request)
        return self.scheduler.add(request)

    def step(self) -> Step | None:
        """Begin a step and collect the oldest; returns the one that was begun."""
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if step is not None:
            self.in_flight.append(step)
            self.runner.forward(step.batch)
            self.runner.sample(step.samples, step.scores)
        if self.in_flight and (step is None or len(self.in_flight) == self.runner.max_in_flight):
            self.scheduler.update(self.in_flight.popleft(), self.runner.collect())
            self.scheduler.check_integrity()
        return step

    def steps(self) -> Iterator[Step]:
        """Begin steps as long as there is work; with two in flight some calls only collect."""
        while self.scheduler.has_work:
            if (step := self.step()) is not None:
                yield step

    def settle(self) -> None:
        """Collect what is in flight."""
        while self.in_flight:
            self.scheduler.update(self.in_flight.popleft(), self.runner.collect())
        self.scheduler.check_integrity()

    def run(self, max_steps: int = 2000) -> int:
        for num_steps in range(max_steps):
            if self.step() is None and not self.scheduler.has_work:
                return num_steps
        raise AssertionError("it does not end")


def rows(step: Step) -> dict[str, int]:
    """Tokens per sequence of a step, in the batch's order."""
    names = [sequence.request_id for sequence in step.sequences]
    return dict(zip(names, step.batch.query_lens, strict=True))


def reference(sequence: Sequence) -> list[int]:
    """Greedy tokens without blocks, batches or chunks."""
    sample = SampleInput(SamplingParams())
    return generate(sequence.request.prompt_token_ids, [sample] * sequence.params.max_tokens)


def output(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]


def test_long_prompt_runs_in_chunks_and_samples_once_it_is_complete():
    bench = Bench(max_num_batched_tokens=8, max_num_seqs=4)
    sequence = bench.add("a", 19, max_tokens=3)
    sizes = []
    for step in bench.steps():
        sizes.append((rows(step)["a"], len(step.sampled)))
    assert sizes == [(8, 0), (8, 0), (3, 1), (1, 1), (1, 1)]
    assert output(sequence) == reference(sequence)
    assert bench.scheduler.blocks.num_held == 0


def test_decodes_go_first_and_prefill_takes_what_is_left():
    bench = Bench(max_num_batched_tokens=8, max_num_seqs=4)
    for name in "ab":
        bench.add(name, [ord(name)] * 3, max_tokens=20)
    assert rows(bench.step()) == {"a": 3, "b": 3}
    bench.add("c", 14, max_tokens=20)
    bench.add("d", [7, 8], max_tokens=20)
    assert rows(bench.step()) == {"a": 1, "b": 1, "c": 6}
    assert rows(bench.step()) == {"a": 1, "b": 1, "c": 6}
    assert rows(bench.step()) == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert rows(bench.step()) == dict.fromkeys("abcd", 1)


def test_first_come_first_served_and_never_more_than_max_num_seqs():
    bench = Bench(max_num_seqs=2)
    sequences = [bench.add(name, [ord(name)], max_tokens=1 + ord(name) % 3) for name in "abcde"]
    started = []
    for step in bench.steps():
        assert len(step.sequences) <= 2
        started += [seq.request_id for seq in step.sequences if seq.request_id not in started]
    assert started == list("abcde")
    assert all(sequence.finish_reason == "length" for sequence in sequences)


def test_head_of_the_queue_is_not_overtaken_by_a_smaller_one():
    bench = Bench(num_blocks=6, max_num_seqs=4)
    bench.add("a", [1] * 13, max_tokens=4)
    bench.step()
    bench.add("large", [2] * 12, max_tokens=4)
    bench.add("small", [3], max_tokens=1)
    assert rows(bench.step()) == {"a": 1}
    assert [seq.request_id for seq in bench.scheduler.waiting] == ["large", "small"]


def test_admission_leaves_a_block_for_each_that_runs():
    """Else the newcomer would be preempted in the next step, its prompt computed for nothing."""
    bench = Bench(num_blocks=6, max_num_seqs=4)
    bench.add("a", 7, max_tokens=4)
    bench.step()  # it holds 2 blocks now, and will need a third after the next step
    bench.add("b", [7] * 16, max_tokens=1)
    assert rows(bench.step()) == {"a": 1}
    bench.add("c", [8], max_tokens=1)
    bench.scheduler.abort("b")
    assert rows(bench.step()) == {"a": 1, "c": 1}
    assert bench.scheduler.num_preemptions == 0


def test_the_latest_is_preempted_and_still_says_the_same():
    bench = Bench(num_blocks=6, max_num_seqs=3)
    sequences = [bench.add(name, [ord(name)] * 3, max_tokens=14) for name in "abc"]
    order_kept = True
    for step in bench.steps():
        waiting = [seq.request_id for seq in bench.scheduler.waiting]
        running = [seq.request_id for seq in bench.scheduler.running]
        order_kept &= running + waiting == sorted(running + waiting)
        assert step.sequences
    assert order_kept
    assert sequences[0].num_preemptions == 0
    assert sequences[2].num_preemptions >= 1
    for sequence in sequences:
        assert sequence.finish_reason == "length"
        assert output(sequence) == reference(sequence)
    assert bench.scheduler.blocks.num_held == 0
    assert bench.scheduler.num_prefix_query_tokens == 9, "a second start is no new query"


def test_a_sequence_in_the_middle_of_its_prompt_can_be_preempted():
    """Its blocks go to an older one; nothing of it may be left in the step."""
    bench = Bench(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=3)
    old = bench.add("old", [1, 2, 3], max_tokens=20)
    bench.step()
    bench.add("new", 23, max_tokens=2)
    seen = False
    for _ in bench.steps():
        new = next((s for s in bench.scheduler.waiting if s.num_preemptions), None)
        seen |= new is not None and new.num_output_tokens == 0
    assert seen
    assert output(old) == reference(old)


def test_draws_are_one_per_output_position_whatever_happens_between():
    """Preemption recomputes tokens, it must not sample for them again."""
    params = {"temperature": 1.0, "max_tokens": 14, "seed": 5}
    bench = Bench(num_blocks=6, max_num_seqs=3)
    sequences = [bench.add(name, [ord(name)] * 3, **params) for name in "abc"]
    bench.run()
    assert bench.scheduler.num_preemptions
    key = make_draw_key(5, 0, 0)
    samples = [SampleInput(SamplingParams(**params), draw_uniform(key, n)) for n in range(14)]
    for sequence in sequences:
        assert output(sequence) == generate(sequence.request.prompt_token_ids, samples)


def test_draws_differ_by_request_and_server_and_repeat_by_seed():
    def first_uniform(*args):
        return draw_uniform(make_draw_key(*args), 0)

    assert first_uniform(None, 0, 1) == first_uniform(None, 0, 1)
    assert (
        len({first_uniform(None, 0, 1), first_uniform(None, 0, 2), first_uniform(None, 1, 1)}) == 3
    )
    assert first_uniform(7, 0, 1) == first_uniform(7, 1, 2)
    assert len({first_uniform(7, 0, 1), first_uniform(-7, 0, 1), first_uniform(8, 0, 1)}) == 3


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({"max_tokens": 3}, [5, 6, 7, 8], ([5, 6, 7], "length")),
        ({"max_tokens": 9}, [5, EOS, 7], ([5, EOS], "stop")),
        ({"max_tokens": 2}, [5, EOS], ([5, EOS], "stop")),
        ({"max_tokens": 3, "ignore_eos": True}, [5, EOS, 7], ([5, EOS, 7], "length")),
        ({"max_tokens": 9, "stop_token_ids": (7,)}, [5, 6, 7], ([5, 6, 7], "stop")),
        (
            {"max_tokens": 9, "stop_token_ids": (EOS,), "ignore_eos": True},
            [5, EOS],
            ([5, EOS], "stop"),
        ),
    ],
)
def test_ends_for_the_true_reason(params, tokens, expected):
    # A step in flight may ask for one more than is there.
    bench = Bench(next_token=lambda context, sample: [*tokens, 99][len(context) - 2])
    sequence = bench.add("a", [1, 2], **params)
    bench.run()
    assert (output(sequence), sequence.finish_reason) == expected
    assert bench.scheduler.blocks.num_held == 0


def test_what_can_never_fit_is_refused_and_what_just_fits_is_served():
    bench = Bench(num_blocks=4, block_size=4)
    with pytest.raises(RequestError, match="10 tokens of prompt and up to 8 of completion"):
        bench.add("a", 10, max_tokens=8)
    sequence = bench.add("b", 10, max_tokens=7)  # the last of 17 tokens never enters the cache
    bench.run()
    assert sequence.finish_reason == "length" and sequence.num_output_tokens == 7


@pytest.mark.parametrize("phase", ["waiting", "mid-prefill", "decoding", "preempted"])
def test_abort_in_every_phase_frees_everything_at_once(phase):
    bench = Bench(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=6)
    other = bench.add("other", [9, 9, 9], max_tokens=18)
    if phase == "waiting":
        bench.add("third", [8], max_tokens=1)
        bench.step()
    victim = bench.add("victim", 18, max_tokens=4)
    reached = {
        "waiting": lambda: victim in bench.scheduler.waiting,
        "mid-prefill": lambda: 0 < victim.num_computed_tokens < victim.num_prompt_tokens,
        "decoding": lambda: victim.num_output_tokens == 2,
        "preempted": lambda: victim.num_preemptions == 1,
    }[phase]
    steps = bench.steps()
    while not reached():
        next(steps)
    assert bench.scheduler.abort("victim") is victim
    assert victim.finish_reason == "abort" and victim.block_table == []
    bench.scheduler.check_integrity()
    bench.settle()  # a step in flight may still write its blocks
    held = bench.scheduler.blocks.num_held
    assert held == sum(len(seq.block_table) for seq in bench.scheduler.running)
    assert bench.scheduler.abort("victim") is None
    bench.scheduler.check_integrity()
    bench.run()
    assert output(other) == reference(other)
    assert not bench.scheduler.has_work


def test_equal_prompt_is_taken_from_the_cache_and_counted():
    bench = Bench()
    first = bench.add("a", 18, max_tokens=4)
    bench.run()
    second = bench.add("b", 18, max_tokens=4)
    assert rows(bench.step()) == {"b": 2}
    bench.run()
    assert output(second) == output(first) == reference(first)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert bench.scheduler.num_prefix_query_tokens == 36
    assert bench.scheduler.num_prefix_hit_tokens == 16


def test_equal_prompts_in_one_step_do_not_read_each_others_unwritten_blocks():
    """A block may be found only in a step after the one that writes it; the runner checks reads."""
    bench = Bench()
    pair = [bench.add(name, 18, max_tokens=4) for name in "ab"]
    assert rows(bench.step()) == {"a": 18, "b": 18}
    bench.settle()
    assert pair[0].block_table[:4] == pair[1].block_table[:4]  # one copy from now on
    bench.run()
    assert output(pair[0]) == output(pair[1]) == reference(pair[0])


def test_blocks_of_a_chunk_that_has_not_run_are_not_found():
    bench = Bench(max_num_batched_tokens=16)
    pair = [bench.add(name, 26, max_tokens=4) for name in "ab"]
    assert rows(bench.step()) == {"a": 16}
    assert rows(bench.step()) == {"a": 10, "b": 6}  # 16 of b's 26 tokens were there
    bench.run()
    assert output(pair[0]) == output(pair[1]) == reference(pair[0])


@pytest.mark.parametrize("max_num_batched_tokens", [1024, 48])
def test_equal_prompts_that_arrive_together_are_computed_once(max_num_batched_tokens):
    bench = Bench(num_blocks=400, max_num_batched_tokens=max_num_batched_tokens)
    equal = [bench.add(name, 99, max_tokens=4) for name in "abcd"]
    longer = bench.add("e", [*range(80), *[255] * 20], max_tokens=4)
    bench.run()
    num_prompt_tokens = 99 + 3 * 3 + 20  # the last of 24 full blocks ends at 96
    num_decoded_tokens = 5 * 3
    num_computed = sum(sum(batch.query_lens) for batch in bench.runner.batches)
    assert num_computed == num_prompt_tokens + num_decoded_tokens
    for sequence in (*equal, longer):
        assert output(sequence) == reference(sequence)


@pytest.mark.parametrize("how", ["abort", "invalid"])
def test_who_waits_for_blocks_goes_on_alone_when_they_do_not_come(how):
    is_broken = how == "invalid"

    def next_token(context, sample):
        nonlocal is_broken
        if is_broken:
            is_broken = False
            return INVALID_TOKEN
        return generate(context, [sample])[0]

    bench = Bench(next_token=next_token)
    first, second = (bench.add(name, 99, max_tokens=4) for name in "ab")
    step = bench.scheduler.schedule()
    assert rows(step) == {"a": 99}
    bench.runner.forward(step.batch)
    bench.runner.sample(step.samples)
    if how == "abort":
        bench.scheduler.abort("a")
    bench.scheduler.update(step, bench.runner.collect())
    assert first.finish_reason == ("abort" if how == "abort" else "error")
    assert rows(bench.step()) == {"b": 99}
    bench.run()
    assert output(second) == reference(second)


def test_answer_is_reused_by_the_next_turn():
    bench = Bench()
    first = bench.add("a", 7, max_tokens=10)
    bench.run()
    bench.add("b", [*first.token_ids, 1, 2, 3], max_tokens=1)
    assert rows(bench.step()) == {"b": 4}  # 16 of 20 tokens were computed, 17 minus the last


def test_a_state_is_kept_where_a_prompt_ends_and_where_prompts_part():
    """The runner asserts that each sequence goes on from the state of its own beginning."""
    bench = Bench(has_states=True, block_size=4)
    sequences = []
    common = [1] * 12
    for name, prompt, expected in (
        ("first", [*common, *[2] * 6], [16, 2]),  # up to its last full block, and the rest
        ("longer", [*common, *[2] * 6, 5, 5], [4]),  # from 16 on; no block more is full
        ("other", [*common, *[3] * 6], [12, 4, 2]),  # nothing is kept where it parts, so far
        ("third", [*common, *[4] * 6], [4, 2]),  # from 12 on
    ):
        sequence = bench.add(name, prompt, max_tokens=3)
        sizes = [rows(step)[name] for step in bench.steps()]
        assert sizes == [*expected, 1, 1]
        assert output(sequence) == reference(sequence)
        sequences.append(sequence)
    assert [one.num_cached_tokens for one in sequences] == [0, 16, 0, 12]
    bench.scheduler.abort(bench.add("gone", [9] * 18, max_tokens=3).request_id)


def test_states_are_few_and_go_with_their_blocks():
    bench = Bench(num_blocks=20, has_states=True, max_num_seqs=2, block_size=4)
    states = bench.scheduler.blocks.states

    def ask(token: int) -> int:
        sequence = bench.add(f"{token} {bench.scheduler.num_arrivals}", [token] * 9, max_tokens=1)
        bench.run()
        return sequence.num_cached_tokens

    assert [ask(token) for token in (1, 2, 3, 4, 1, 5)] == [0, 0, 0, 0, 8, 0]
    assert [ask(token) for token in (1, 3, 2)] == [8, 8, 0], "there are four, 2 was used last"
    bench.add("large", 76, max_tokens=1)
    bench.run()
    assert [states.find([block])[1] for block in range(20)].count(None) == 19, "only its own"
    assert ask(1) == 0


def test_invalid_logits_end_one_sequence_and_leave_nothing_reusable():
    bench = Bench(
        next_token=lambda context, sample: INVALID_TOKEN if context[0] == 0 else 65,
    )
    bad = bench.add("bad", 18, max_tokens=4)
    good = bench.add("good", [1] * 6, max_tokens=4)
    bench.run()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert bad.num_output_tokens == 0
    assert bench.scheduler.blocks.match(bad.token_ids) == []
    bench.scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_says_what_each_request_alone_would_say(seed, monkeypatch):
    """Mixed lengths, shared beginnings, a small pool, random aborts, any chunk size."""
    rng = random.Random(seed)
    if seed % 4 > 0:  # beginnings are short, and are to be waited for
        monkeypatch.setattr(shared_prefill, "MIN_SAVED_TOKENS", 4)
    bench = Bench(
        num_blocks=rng.choice((10, 16, 40)),
        max_num_seqs=rng.choice((2, 4)),
        max_num_batched_tokens=rng.choice((4, 7, 16, 64)),
        enable_prefix_caching=seed % 3 > 0,
        has_states=seed % 2 > 0,
    )
    beginnings = [[rng.randrange(200) for _ in range(12)] for _ in range(2)]
    sequences: list[Sequence] = []
    while len(sequences) < 40 or bench.scheduler.has_work:
        if len(sequences) < 40 and rng.random() < 0.4:
            prompt = rng.choice(beginnings)[: rng.randrange(13)]
            prompt = prompt + [rng.randrange(200) for _ in range(rng.randrange(1, 8))]
            sequences.append(
                bench.add(str(len(sequences)), prompt, max_tokens=rng.randrange(1, 18))
            )
        if sequences and rng.random() < 0.03:
            bench.scheduler.abort(rng.choice(sequences).request_id)
        had_work, num_in_flight = bench.scheduler.has_work, bench.scheduler.num_in_flight
        has_begun = bench.step() is not None
        has_collected = bench.scheduler.num_in_flight < num_in_flight
        assert (has_begun or has_collected) == had_work, "work, but no progress"
    for sequence in sequences:
        expected = reference(sequence)[: sequence.num_output_tokens]
        assert output(sequence) == expected
        assert sequence.finish_reason == "abort" or len(expected) == sequence.params.max_tokens
    assert bench.scheduler.blocks.num_held == 0


def test_a_batch_says_how_many_logits_each_token_takes():
    bench = Bench(max_num_batched_tokens=64, max_num_seqs=8)
    bench.add("greedy", 3, max_tokens=4)
    step = bench.step()
    assert (len(step.sampled), step.batch.num_top) == (1, [])
    bench.add("ranked", 4, temperature=1.0, top_k=20, max_tokens=2)
    bench.add("any", 5, temperature=1.0, max_tokens=2)
    bench.add("long", 60, temperature=1.0, top_k=5, max_tokens=2)  # is not sampled yet
    step = bench.step()
    wanted = {"greedy": 1, "ranked": 20, "any": 0}
    assert step.batch.num_top == [wanted[one.request_id] for one in step.sampled]
    assert {one.request_id for one in step.sampled} == set(wanted)
    bench.run()
