"""No request, however wrong, makes the engine fail: random ones at its own two doors.

Each seed is a run of its own; a failing one is repeated by its number.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from autotp_serving.batch import INVALID_TOKEN, SampleInput
from autotp_serving.config import ServingConfig
from autotp_serving.engine import Engine, QueueFullError
from autotp_serving.engine.grammar import GrammarError
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.request import Request, RequestError, RequestOutput, SamplingParams
from autotp_serving.structured_output import StructuredOutput
from tests.fakes import ByteTokenizer, FakeRunner, letters

NUM_ROWS = 258
MAX_MODEL_LEN = 96
JUNK = (
    None, "", "x", "\ud800", b"x", True, -1, 0, 1, 2.5, 2**31, 2**63, -(2**70), 1e308, [], (), {},
    float("nan"), float("inf"), float("-inf"), object(), [None], ("a", 1), {"a": 1}, {1: "a"},
    {NUM_ROWS: 1.0}, {-1: 0.5}, {1.5: 1.0}, [NUM_ROWS], (NUM_ROWS - 1,), (NUM_ROWS, 2**40),
)  # fmt: skip


class MoreTokens(ByteTokenizer):
    """Knows more tokens than the model, and writes some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = NUM_ROWS

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A "~" is a token that the model does not have."""
        return [NUM_ROWS + 9 if byte == ord("~") else byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        """Of such a token, too."""
        return b"~" if token_id == NUM_ROWS + 9 else super().token_bytes(token_id)


class PanickingGuide:
    """A guide that goes wrong somewhere, as a library in Rust does: by no Exception."""

    class Panic(BaseException):
        """pyo3's PanicException is one."""

    def __init__(self, at: int) -> None:
        self.error: str | None = None
        self.is_ready = True
        self._num_left = at

    def start(self) -> PanickingGuide:
        """As its own grammar."""
        return self._take(PanickingGuide(self._num_left))

    def allowed(self, num_ahead: int = 0) -> bytes:
        """Letters."""
        return self._take(bytes([0] * 12 + [254, 255, 255, 7] + [0] * 20))

    def accept(self, token_id: int) -> bool:
        """All of them."""
        return self._take(False)

    def _take(self, value: Any) -> Any:
        self._num_left -= 1
        if self._num_left < 0:
            raise self.Panic("the grammar's state is lost")
        return value


def model(context: list[int], sample: SampleInput) -> int:
    """Letters, an end now and then, numbers that are none, and tokens without a text."""
    rng = hash((*context, 5)) % 40
    return {0: ByteTokenizer.EOS, 1: INVALID_TOKEN, 2: NUM_ROWS - 1}.get(
        rng, letters(context, sample)
    )


class Maker:
    """Makes requests: most of them right, or with one thing wrong."""

    def __init__(self, seed: int, compiler: GrammarCompiler) -> None:
        self._draw = random.Random(seed)
        self._compiler = compiler

    def prompt(self) -> Any:
        """Token ids, or a text."""
        rng = self._draw
        kind = rng.random()
        if kind < 0.15:
            return rng.choice(JUNK)
        if kind < 0.4:
            return "".join(rng.choice("abc é\N{GRINNING FACE}~") for _ in range(rng.randint(0, 40)))
        length = rng.choice((1, 2, 15, 16, 17, rng.randint(1, MAX_MODEL_LEN + 2)))
        worst = NUM_ROWS + (rng.random() < 0.1)
        tokens: Any = [rng.randrange(worst) for _ in range(length)]
        if rng.random() < 0.1:
            tokens[rng.randrange(length)] = rng.choice(JUNK)
        return tokens

    def settings(self) -> dict[str, Any]:
        """Arguments of SamplingParams."""
        rng = self._draw
        possible: dict[str, Any] = {
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice((0.0, 0.7, 100.0, 1e-30)),
            "top_p": rng.choice((1.0, 0.5, 1e-9)),
            "top_k": rng.choice((0, 1, 10**9)),
            "min_p": rng.random(),
            "seed": rng.randrange(-(2**63), 2**64),
            "stop": tuple(rng.choice(("a", "bc", "\ud800", "é")) for _ in range(rng.randint(0, 3))),
            "stop_token_ids": (rng.choice((0, NUM_ROWS - 1, NUM_ROWS, 2**31)), ord("q")),
            "ignore_eos": rng.random() < 0.5,
            "skip_special_tokens": rng.random() < 0.5,
            "frequency_penalty": rng.uniform(-2, 2),
            "repetition_penalty": rng.choice((0.01, 1.5, 100.0)),
            "logit_bias": {rng.choice((0, NUM_ROWS - 1, NUM_ROWS, 2**31)): rng.uniform(-100, 100)},
            "min_tokens": rng.randint(0, 3),
            "logprobs": rng.randint(0, 20),
            "prompt_logprobs": rng.randint(0, 20),
        }
        names = rng.sample(sorted(possible), rng.randint(0, 5))
        chosen = {name: possible[name] for name in names}
        if rng.random() < 0.1:
            chosen |= {"max_tokens": 0, "prompt_logprobs": 2}
        if rng.random() < 0.2:
            chosen[rng.choice(sorted(possible))] = rng.choice(JUNK)
        if rng.random() < 0.2:
            chosen["structured_output"] = rng.choice((
                StructuredOutput("regex", "[a-z]{3,9}"), StructuredOutput("json_object"),
                StructuredOutput("text"),
                StructuredOutput("choice", '["yes", "no~"]'), StructuredOutput("regex", "("),
                StructuredOutput("grammar", f'start: "a" <[{NUM_ROWS + 3}]>'),
                StructuredOutput("grammar", f'start: "a" <[{NUM_ROWS - 1}]>'),
            ))  # fmt: skip
            chosen.pop("min_tokens", None)
        return chosen

    def request(self, name: str) -> Request:
        """Raises RequestError or GrammarError."""
        rng = self._draw
        params = SamplingParams(**self.settings())
        prompt = self.prompt()
        if isinstance(prompt, str):
            prompt = MoreTokens().encode(prompt.replace("\ud800", ""))
        if isinstance(prompt, list) and rng.random() < 0.95:
            prompt = tuple(prompt)
        grammar: Any = None
        if params.structured_output is not None:
            grammar = self._compiler.submit(params.structured_output).result()
            if rng.random() < 0.3:
                grammar = PanickingGuide(rng.randrange(12))
        values = {
            "request_id": name, "prompt_token_ids": prompt, "params": params,
            "arrival_time": time.monotonic(), "tenant": rng.choice(("", "a", "b")),
            "grammar": grammar,
        }  # fmt: skip
        if rng.random() < 0.05:
            values[rng.choice(sorted(values))] = rng.choice(JUNK)
        return Request(**values)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(MoreTokens())


@pytest.mark.parametrize("seed", range(60))
def test_the_engine_survives_every_request(seed: int, compiler: GrammarCompiler) -> None:
    rng = random.Random(seed)
    maker = Maker(seed, compiler)
    runner = FakeRunner(rng.randint(1, 12), next_token=model, vocab_size=NUM_ROWS)
    runner.has_states = seed % 3 == 0
    config = ServingConfig(
        model_path="fake", max_num_seqs=rng.randint(1, 5), max_queue_len=rng.randint(1, 30),
        max_num_batched_tokens=rng.choice((5, 16, 64)),
        enable_prefix_caching=rng.random() < 0.5,
    )  # fmt: skip
    outputs: list[RequestOutput] = []
    engine = Engine(runner, MoreTokens(), config, MAX_MODEL_LEN, outputs.extend)
    active: list[str] = []
    num_refused = 0
    for number in range(60):
        try:
            request = maker.request(f"{number}")
            engine.submit(request)
            active.append(request.request_id)
        except (RequestError, GrammarError, QueueFullError):
            num_refused += 1
        if active and rng.random() < 0.1:
            engine.abort(rng.choice(active))
        for _ in range(rng.choice((0, 1, 4))):
            engine.step()
            engine.scheduler.check_integrity()
    for _ in range(MAX_MODEL_LEN * 60 * 12):  # chunks of 5 tokens, each computed several times
        if not engine.has_work:
            break
        engine.step()
    assert engine.failure is None
    assert not engine.has_work, "a request that never ends"
    ended = [one.request_id for one in outputs if one.finish_reason is not None]
    assert sorted(ended) == sorted(active), "each has one end"
    assert active and num_refused
    assert all(0 <= token < NUM_ROWS for one in outputs for token in one.token_ids)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held_blocks) == (0, 0, 0)
    assert not runner.kept and engine._output_processor.is_empty


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An LLM whose one rank is fake."""
    from autotp_serving import llm as module
    from autotp_serving.engine import tokenizer

    runner = FakeRunner(12, next_token=model, vocab_size=NUM_ROWS)
    runner.stop = lambda: None
    runner.find_late_ranks = lambda: "rank 0"
    worker = SimpleNamespace(
        lead=runner, max_model_len=MAX_MODEL_LEN, vocab_size=NUM_ROWS,
        channel=SimpleNamespace(monitor=lambda *_: None),
    )  # fmt: skip
    fake = SimpleNamespace(start_worker=lambda *_: worker)
    monkeypatch.setitem(sys.modules, "autotp_serving.worker.worker", fake)
    monkeypatch.setattr(tokenizer, "HuggingFaceTokenizer", lambda *_, **__: MoreTokens())
    with module.LLM("fake", max_num_seqs=4, max_queue_len=3) as llm:
        yield llm


def test_generate_refuses_or_answers_and_stays_usable(llm: Any, compiler: GrammarCompiler) -> None:
    maker = Maker(7, compiler)
    num_answered = num_refused = 0
    for _ in range(150):
        try:
            params = SamplingParams(**maker.settings())
            prompts = [maker.prompt() for _ in range(2)]
            answers = llm.generate(prompts, params, show_progress=False)
            num_answered += 1
            assert [one for one in answers if one.finish_reason is None] == []
        except (RequestError, GrammarError):
            num_refused += 1
    assert num_answered > 20 and num_refused > 20
    (answer,) = llm.generate(["abc"], SamplingParams(max_tokens=4, seed=1), show_progress=False)
    assert answer.finish_reason is not None and llm._engine.failure is None


def test_a_call_that_was_interrupted_leaves_nothing_to_the_next(llm: Any) -> None:
    runner = llm._engine._runner
    forward, num_steps = runner.forward, 0

    def interrupt(batch: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        forward(batch)

    runner.forward = interrupt
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("SIGINT is ignored here, as under nohup")
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc"] * 9, SamplingParams(max_tokens=30), show_progress=False)
    answers = llm.generate(["x"] * 2, SamplingParams(max_tokens=3), show_progress=False)
    assert all(one.finish_reason for one in answers)
    assert not llm._engine.has_work and llm._engine.stats().num_held_blocks == 0


def test_a_prompt_that_fills_the_cache_to_its_last_block_is_answered_and_a_longer_one_refused() -> (
    None
):
    """One that only wants its own logprobs needs room for its last token as well."""
    outputs: list[RequestOutput] = []
    config = ServingConfig(model_path="fake")
    engine = Engine(FakeRunner(2), ByteTokenizer(), config, MAX_MODEL_LEN, outputs.extend)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    engine.submit(Request("fits", tuple(range(32)), params, 0.0))
    with pytest.raises(RequestError, match="KV cache of 32 tokens"):
        engine.submit(Request("no", tuple(range(33)), params, 0.0))
    for _ in range(5):
        engine.step()
    assert outputs[-1].finish_reason == "length" and not engine.has_work
