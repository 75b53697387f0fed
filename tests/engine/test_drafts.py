"""Drafts change nothing but time: not the text, not the ends, not the blocks; and time for good."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from autotp_serving.batch import INVALID_TOKEN, Batch, DraftInput, SampleInput
from autotp_serving.engine import grammar_guide
from autotp_serving.engine.drafts import Drafter, StepCosts
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.engine.grammar_guide import CompiledGrammar
from autotp_serving.engine.model_drafts import ModelDrafts
from autotp_serving.engine.ngram_index import MAX_INDEXED_LEN, NGRAM_LEN, NgramIndex
from autotp_serving.engine.sequence import Sequence
from autotp_serving.engine.thinking_budget import BudgetTags, ThinkingBudget
from autotp_serving.request import Request, SamplingParams
from autotp_serving.structured_output import Grammar, StructuredOutput
from tests.engine.test_engine import Bench
from tests.fakes import ByteTokenizer, FakeRunner, letters, obey
from tests.head.test_remote_runner import Ranks


@pytest.fixture(autouse=True, params=[1])
def max_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the folder's: mostly one step in flight, and drafts."""
    monkeypatch.setattr(FakeRunner, "max_in_flight", request.param)
    monkeypatch.setattr(FakeRunner, "can_draft", True)


@pytest.fixture(scope="module")
def grammars() -> list[Grammar | None]:
    """What a completion may have to follow; mostly nothing."""
    properties = {"a_long_name": {"enum": ["yes", "no"]}, "another_one": {"type": "string"}}
    sources = {
        "regex": "[abc]{3,9}(xyz|yy){1,9}q?", "choice": '["an answer", "an end", "another"]',
        "json_schema": json.dumps(
            {"type": "object", "properties": properties, "required": [*properties]}
        ),
    }  # fmt: skip
    compiler = GrammarCompiler(ByteTokenizer())
    held = [compiler.submit(StructuredOutput(*one)).result(60) for one in sources.items()]
    budget = ThinkingBudget(7, BudgetTags(ByteTokenizer(), "think"), has_begun=True)
    return [None, None, None, *held, budget]


def model(context: list[int], sample: SampleInput) -> int:
    """Letters, an end now and then, and numbers that are none."""
    chance = hash((*context, 5)) % 60
    return {0: ByteTokenizer.EOS, 1: INVALID_TOKEN}.get(chance, letters(context, sample))


class RandomDrafter(Drafter):
    """So many drafts as it likes, right ones and wrong ones."""

    def __init__(self, seed: int) -> None:
        super().__init__(5)
        self._draw = random.Random(seed)
        self.look_up = self._guess
        self._costs.find = lambda num_seqs, **_: (1.0, 0.1, 0.1)  # known at once

    def _choose_lens(self, sequences: list[Sequence], *_: float) -> list[tuple[Sequence, int]]:
        mosts = [(one, self._find_most(one)) for one in sequences]
        return [(one, self._draw.randint(0, most)) for one, most in mosts if most > 0]

    def _guess(self, sequence: Sequence, count: int) -> list[int]:
        context = list(sequence.token_ids)
        if sequence.guide is not None:  # which knows better
            return self._draw.choices(b'abcxyz"', k=count)
        for _ in range(count):
            sample = sequence.make_sample(context[sequence.num_tokens :])
            token = obey(model(context, sample), sample)
            context.append(self._draw.choice((token, token, token, 98)) if token >= 0 else 99)
        return context[sequence.num_tokens :]


def submit_some(bench: Bench, seed: int, grammars: list[Grammar | None]) -> list[str]:
    """Requests of all kinds; returns their names."""
    rng = random.Random(seed)
    for number in range(14):
        max_tokens = rng.randint(1, 40)
        kinds: dict[str, Any] = {
            "temperature": rng.choice((0.0, 1.0)), "seed": rng.randrange(9),
            "logprobs": rng.randint(0, 2), "prompt_logprobs": 1, "min_tokens": min(max_tokens, 9),
            "stop": (rng.choice(("a", "bc", "z")),), "stop_token_ids": (ord("q"),),
            "frequency_penalty": 0.5, "logit_bias": {97: 1.0}, "ignore_eos": True,
        }  # fmt: skip
        chosen = {name: kinds[name] for name in rng.sample(sorted(kinds), rng.randint(0, 4))}
        prompt = "a beginning that some share 1234"[: rng.choice((3, 32))] + "x" * rng.randint(1, 9)
        grammar = rng.choice(grammars)
        bench.submit(f"{number}", prompt, grammar=grammar, max_tokens=max_tokens, **chosen)
    return [f"{number}" for number in range(14)]


def collect(bench: Bench, name: str) -> tuple[Any, ...]:
    """All that a client sees, joined, and how it ended."""
    outputs = bench.outputs(name)
    logprobs = [one for output in outputs for one in output.logprobs]
    last = outputs[-1]
    ends = (last.finish_reason, last.stop_string, last.error, last.num_output_tokens)
    return bench.text(name), bench.tokens(name), logprobs, outputs[0].prompt_logprobs, ends


@pytest.mark.parametrize("seed", range(24))
def test_clients_see_the_same_with_drafts_and_without(
    seed: int, grammars: list[Grammar | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With preemption, shared prefixes, chunks, stop strings, structured output, penalties, and
    clients that leave; every other time with two steps in flight.
    """
    monkeypatch.setattr(FakeRunner, "max_in_flight", 1 + seed // 4 % 2)
    for one in grammars:
        if isinstance(one, CompiledGrammar):
            one.is_slow = seed % 2 == 1
    rng = random.Random(seed)
    num_blocks, max_num_seqs = rng.randint(21, 30), rng.randint(1, 6)
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": rng.choice((6, 16, 64))}
    plain = Bench(FakeRunner(64, 4, next_token=model), speculative_tokens=0, **limits)
    names = submit_some(plain, seed, grammars)
    plain.run()
    groups = Ranks() if seed % 4 == 0 else None  # the head's way to the ranks
    runner: Any = FakeRunner(num_blocks, 4, next_token=model)
    if groups is not None:
        groups.attach(num_blocks, 4)
        groups.runner.next_token, runner = model, groups.remote
    bench = Bench(runner, **limits)
    drafter = bench.engine.scheduler.drafter = RandomDrafter(seed)
    if seed % 3 == 1:
        drafter.use_model(ModelDrafts(bench.engine._draft, max_tokens=24))
    assert submit_some(bench, seed, grammars) == names
    gone = set()
    while bench.engine.has_work:
        bench.engine.step()
        bench.engine.scheduler.check_integrity()
        if rng.random() < 0.02:
            gone.add(name := rng.choice(names))
            bench.engine.abort(name)
    for name in names:
        expected, found = collect(plain, name), collect(bench, name)
        if found[-1][0] == "abort":
            assert name in gone and expected[0].startswith(found[0])
            assert expected[1][: len(found[1])] == found[1]
        else:
            assert found == expected, name
    assert drafter.num_draft_tokens >= drafter.num_accepted_tokens > 0
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_held_blocks) == (0, 0)
    if groups is not None:
        groups.close()
        assert not groups.mistakes


def test_none_where_the_ranks_cannot() -> None:
    runner = FakeRunner()
    runner.can_draft = False
    assert Bench(runner, speculative_tokens=4).engine.scheduler.drafter._max_drafts == 0


def test_none_where_steps_overlap_and_the_choice_depends_on_the_tokens_before() -> None:
    runner = FakeRunner()
    runner.max_in_flight = 2
    bench = Bench(runner, speculative_tokens=4)
    bench.engine.scheduler.drafter = RandomDrafter(0)
    bench.engine.scheduler.drafter.plain_only = True
    bench.submit("a", max_tokens=20, repetition_penalty=1.1)
    bench.run()
    assert not bench.engine.stats().num_drafts


@pytest.mark.parametrize("max_in_flight", [1, 2], indirect=True)
def test_a_text_that_repeats_is_run_in_fewer_steps() -> None:
    """By the whole of it: look-up, estimates, acceptance. Steps take 2 ms, however wide, by a clock
    that other work on the machine does not disturb.
    """
    bench = Bench(FakeRunner(next_token=lambda context, _: context[-7]))
    drafter = bench.engine.scheduler.drafter
    add_step = drafter.add_step
    drafter.add_step = lambda step, _, waited: add_step(step, 0.002, waited=waited)
    bench.submit("a", prompt="abcdefgabcdefg", max_tokens=100)
    bench.run()
    assert bench.text("a") == ("abcdefg" * 15)[:100]
    stats = bench.engine.stats()
    assert stats.num_steps < 60 and stats.num_accepted_tokens > 40
    assert stats.num_accepted_tokens == 100 - stats.num_steps


@pytest.mark.parametrize(("cost", "acceptance", "least"), [
    (0.15, 0.0, 0.98), (0.15, 0.4, 1.1), (0.15, 0.8, 1.7), (0.02, 0.8, 2.5), (0.5, 0.2, 0.97),
    (1.0, 0.0, 0.97), (1.0, 0.9, 0.97),
])  # fmt: skip
@pytest.mark.parametrize("num_seqs", [1, 8])
def test_no_load_is_slower_and_drafts_that_pay_are_made(
    num_seqs: int, cost: float, acceptance: float, least: float
) -> None:
    """Steps of 1 and `cost` more for each draft, which comes true as often as it is said."""
    assert measure_gain(num_seqs, cost, acceptance) >= least


@pytest.mark.parametrize(("cost", "acceptance", "wait", "least"), [
    (0.05, 0.0, 0.2, 0.98), (0.05, 0.4, 0.2, 1.15), (0.05, 0.8, 0.2, 1.9), (0.02, 0.8, 0.9, 1.4),
    (0.15, 0.8, 0.1, 1.6), (0.5, 0.2, 0.2, 0.98), (1.0, 0.9, 0.5, 0.97), (0.02, 0.4, 0.9, 0.97),
])  # fmt: skip
@pytest.mark.parametrize("num_seqs", [1, 8])
def test_nor_where_drafts_have_to_wait_for_the_tokens_in_flight(
    num_seqs: int, cost: float, acceptance: float, wait: float, least: float
) -> None:
    """The same, and `wait` more where the next step begins only once a step's tokens are known."""
    assert measure_gain(num_seqs, cost, acceptance, wait) >= least


def measure_gain(num_seqs: int, cost: float, acceptance: float, wait: float | None = None) -> float:
    """How many times as many tokens in the time drafts bring, over two requests of 250 steps.

    Args:
        wait: None with one step in flight.
    """
    rng = random.Random(3)
    drafter = Drafter(4)
    drafter.look_up = lambda sequence, count: [0] * count
    seconds = num_tokens = 0.0
    for _ in range(2):
        params = SamplingParams(max_tokens=10**6)
        sequences = [Sequence(Request(f"{n}", (1,), params, 0.0), n) for n in range(num_seqs)]
        drafts: dict[Sequence, list[int]] = {}
        for number in range(250):
            waits = False
            if wait is None:
                drafts = drafter.propose(sequences, 256, lambda *_: True)
            elif number:
                for sequence in sequences:
                    sequence.num_pending_tokens = 1
                waits = bool(drafts) or drafter.wants_tokens(sequences, 256)
            num_drafts = sum(map(len, drafts.values()))
            for sequence in sequences:
                sequence.num_pending_tokens = 0
                tokens = drafts.get(sequence, [])
                hits = [rng.random() < acceptance for _ in range(len(tokens) + 1)]
                num_accepted = min([*hits, False].index(False), len(tokens))
                sequence.token_ids += [1 - hit for hit in hits[: num_accepted + 1]]
                if tokens:
                    drafter.add_outcome(sequence, len(tokens), num_accepted)
                num_tokens += 1 + num_accepted
            time = 1.0 + cost * num_drafts / num_seqs + waits * (wait or 0.0)
            step: Any = SimpleNamespace(
                sampled=sequences, batch=SimpleNamespace(num_drafts=[num_drafts]),
                num_tokens=num_seqs + num_drafts,
            )  # fmt: skip
            seconds += time
            drafts = drafter.propose(sequences, 256, lambda *_: True) if waits else {}
            drafter.add_step(step, time * rng.uniform(0.95, 1.05), waited=waits)
    return num_tokens / seconds / num_seqs


@pytest.mark.parametrize("is_slow", [False, True])
def test_tokens_that_must_come_take_few_steps(
    is_slow: bool, grammars: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and punctuation of JSON, whatever the model would rather say; steps take 2 ms."""
    monkeypatch.setattr(grammar_guide, "SLOW_SECONDS", 1e9)  # on a busy machine all is slow
    grammars[5].is_slow = is_slow
    bench = Bench(FakeRunner(next_token=lambda context, _: ord('"'), delay=0.002))
    bench.submit("a", prompt="short", max_tokens=3, ignore_eos=True)  # steps are measured
    bench.run()
    bench.submit("b", grammar=grammars[5], max_tokens=99)
    before = bench.engine.stats().num_steps
    bench.run()
    assert json.loads(bench.text("b"))["another_one"] == ""
    stats = bench.engine.stats()
    num_steps = stats.num_steps - before
    assert len(bench.tokens("b")) > 30 and num_steps < 15
    assert stats.num_accepted_tokens == stats.num_draft_tokens


@pytest.mark.parametrize(("pass_cost", "acceptance", "least"), [
    (1.0, 1.0, 0.97), (1.0, 0.0, 0.97), (0.3, 0.0, 0.97), (0.1, 0.9, 1.7), (0.5, 0.9, 0.97),
])  # fmt: skip
@pytest.mark.parametrize("num_seqs", [1, 8])
def test_a_draft_model_runs_where_its_passes_pay(
    num_seqs: int, pass_cost: float, acceptance: float, least: float
) -> None:
    """A pass of it takes `pass_cost` of a step, however many sequences guess in it."""
    rng = random.Random(3)
    spent = 0.0

    def draft(batch: Batch, drafts: list[DraftInput]) -> list[list[int]]:
        nonlocal spent
        num_passes = max([1, *(len(one.uniforms) for one in drafts)])
        spent += pass_cost * (num_passes + 0.05 * (len(batch.token_ids) - len(batch.rows)))
        return [[0] * len(one.uniforms) for one in drafts]

    drafter = Drafter(4)
    drafter.use_model(ModelDrafts(draft, 512))
    seconds = num_tokens = 0.0
    for _ in range(3):
        params = SamplingParams(max_tokens=10**6)
        requests = [Request(f"{n}", (1,) * 30, params, 0.0) for n in range(num_seqs)]
        sequences = [Sequence(request, n) for n, request in enumerate(requests)]
        for _ in range(250):
            spent = 0.0
            drafts = drafter.propose(sequences, 256, lambda *_: True)
            for sequence in sequences:
                tokens = drafts.get(sequence, [])
                hits = [rng.random() < acceptance for _ in tokens]
                num_accepted = [*hits, False].index(False)
                sequence.token_ids += [*tokens[:num_accepted], 1]
                num_tokens += num_accepted + 1
                if tokens:
                    drafter.add_outcome(sequence, len(tokens), num_accepted)
            num_drafts = sum(map(len, drafts.values()))
            time = 1.0 + spent + 0.1 * num_drafts / num_seqs
            step: Any = SimpleNamespace(
                sampled=sequences, batch=SimpleNamespace(num_drafts=[num_drafts]),
                num_tokens=num_seqs + num_drafts,
            )  # fmt: skip
            drafter.add_step(step, time * rng.uniform(0.95, 1.05))
            seconds += time
    assert num_tokens / seconds / num_seqs >= least


def test_what_a_model_costs_is_not_held_against_tokens_that_must_come() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.add(1, 0, 1.0)
        costs.add(1, 2, 3.0, by_model=True)
        costs.add(1, 5, 1.5)
    assert costs.find(1, by_model=True) == pytest.approx((1.0, 0.1, 1.0))
    assert costs.find(1) == pytest.approx((1.0, 0.1, 0.1))


def test_look_up_finds_the_latest_place_of_the_last_tokens() -> None:
    rng = random.Random(1)
    token_ids = [rng.randrange(5) for _ in range(20)]
    index = NgramIndex(400)
    num_found = 0
    for _ in range(300):
        found = index.look_up(token_ids, 4)
        last = token_ids[-NGRAM_LEN:]
        places = [
            end
            for end in range(NGRAM_LEN, len(token_ids))
            if token_ids[end - NGRAM_LEN : end] == last
        ]
        if found:
            num_found += 1
            text = token_ids[places[-1] :] * 4
            assert found == text[:4]
        token_ids += [rng.randrange(5) for _ in range(rng.randint(1, 3))]
    assert num_found > 200
    assert NgramIndex(100).look_up([1, 2], 4) == [], "shorter than an n-gram"
    assert NgramIndex(100).look_up([7] * 9, 4) == [7] * 4


def test_an_index_is_bounded() -> None:
    index = NgramIndex(10**9)
    assert len(index._ends) <= 2 * MAX_INDEXED_LEN
    far = [1, 2, 3, 4, *range(10, 10 + MAX_INDEXED_LEN), 1, 2, 3]
    assert index.look_up(far, 1) == [], "too far back"
