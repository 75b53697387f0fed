"""Structured outputs: what is compiled, what is refused, what a completion can be."""

from __future__ import annotations

import json
import random
import threading
import time
from types import SimpleNamespace

import pytest

from autotp_serving.engine import grammar, grammar_compiler, grammar_guide
from autotp_serving.engine.grammar import GrammarError
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.engine.grammar_guide import CompiledGrammar
from autotp_serving.engine.sandbox_helper import SLACK, SandboxBusyError
from autotp_serving.engine.sequence import UNFOLLOWABLE
from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.request import Request, RequestError, SamplingParams
from autotp_serving.structured_output import StructuredOutput
from tests.engine.test_engine import Bench
from tests.fakes import ByteTokenizer, FakeRunner

EOS = ByteTokenizer.EOS


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer())


def compile_one(compiler: GrammarCompiler, kind: str, source: str = "") -> CompiledGrammar:
    return compiler.submit(StructuredOutput(kind, source)).result(60)


def follow(compiled: CompiledGrammar, text: str) -> str:
    """ "complete", "open" (more must come), or "refused at" the first byte not allowed."""
    guide = compiled.start()
    is_complete = False
    for index, byte in enumerate(text.encode()):
        assert not is_complete, "it ended before its text did"
        if not int.from_bytes(guide.allowed(), "little") >> byte & 1:
            return f"refused at {index}"
        is_complete = guide.accept(byte)
        assert guide.error is None
    if is_complete or int.from_bytes(guide.allowed(), "little") >> EOS & 1:
        return "complete"
    return "open"


VERDICT = '{"type": "object", "properties": {"verdict": {"enum": ["yes", "no"]}}}'
ANY_MORE = VERDICT[:-1] + ', "additionalProperties": true}'
NUMBER = {"type": "integer"}
IN_ORDER = json.dumps(
    {
        "$defs": {"one": {"type": "object", "properties": {"x": NUMBER}}},
        "properties": {
            "b": NUMBER, "a": NUMBER, "c": {"type": "array", "items": {"$ref": "#/$defs/one"}},
        },
        "required": ["a", "c", "b"],
    }
)  # fmt: skip
# Objects whose properties come from two places, and one that must have a property without a name.
FROM_TWO = json.dumps({"allOf": [{"properties": {"a": NUMBER}}, {"properties": {"b": NUMBER}}]})
UNNAMED = json.dumps({"type": "object", "properties": {"a": NUMBER}, "required": ["a", "z"]})


@pytest.mark.parametrize(
    ("kind", "source", "text", "expected"),
    [
        ("json_object", "", '{"a":[1,null,{}]}', "complete"),
        ("json_object", "", '{"a": 1}', "refused at 5"),
        ("json_object", "", '{"a":1,"b":2}', "complete"),
        ("json_schema", VERDICT, '{"verdict":"yes"}', "complete"),
        ("json_schema", VERDICT, '{ "verdict":"yes"}', "refused at 1"),
        ("json_schema", VERDICT, '{"verdict":"yes","why":1}', "refused at 16"),
        ("json_schema", ANY_MORE, '{"verdict":"yes","why":1}', "complete"),
        ("json_schema", '{"type": "object"}', '{"a":1}', "complete"),
        ("json_schema", '{"properties": {}, "type": "object"}', '{"a":1}', "refused at 1"),
        ("json_schema", IN_ORDER, '{"b":1,"a":2,"c":[{"x":3}]}', "complete"),
        ("json_schema", IN_ORDER, '{"a":', "refused at 2"),
        ("json_schema", IN_ORDER, '{"b":1,"a":2,"c":[{"x":3,"y":4}]}', "refused at 24"),
        ("json_schema", FROM_TWO, '{"a":1,"b":2}', "complete"),
        ("json_schema", UNNAMED, '{"a":1,"z":2}', "complete"),
        ("json_object", "", "[1]", "refused at 0"),
        ("json_schema", '{"type": "integer"}', "-12", "complete"),
        ("json_schema", '{"type": "integer"}', "1.5", "refused at 1"),
        ("json_schema", "{}", '"anything"', "complete"),
        ("json_schema", '{"enum": ["a", "b"]}', '"c"', "refused at 1"),
        ("regex", "a(b|c)+", "abcb", "complete"),
        ("regex", "a(b|c)+", "a", "open"),
        ("regex", "a(b|c)+", "abx", "refused at 2"),
        ("choice", '["yes", "no", "no way"]', "no", "complete"),
        ("choice", '["yes", "no", "no way"]', "no way", "complete"),
        ("choice", '["yes", "no", "no way"]', "nope", "refused at 2"),
        ("choice", json.dumps(['a "b"\\c\n', "\N{GRINNING FACE}"]), 'a "b"\\c\n', "complete"),
        ("choice", json.dumps(['a "b"', "\N{GRINNING FACE}"]), "\N{GRINNING FACE}", "complete"),
        ("grammar", 'start: "a" start | "b"', "aaab", "complete"),
        ("grammar", 'root ::= "a" root | "b"', "aac", "refused at 2"),
    ],
)
def test_what_may_be_written(compiler, kind, source, text, expected) -> None:
    assert follow(compile_one(compiler, kind, source), text) == expected


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_schema", "{", "EOF"),
        ("json_schema", "[1]", "object"),
        ("json_schema", '{"type": "strang"}', "strang"),
        ("json_schema", '{"$ref": "#/missing"}', "missing"),
        ("json_schema", '{"not": {"type": "string"}}', "Unimplemented keys"),
        ("json_schema", '{"type": "string", "pattern": "("}', "unclosed group"),
        ("regex", "[a", "unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", "start: a", "unknown name"),
        ("grammar", "root ::= a", "Rule 'a' not found"),
        ("regex", "a" * (grammar_compiler.MAX_SOURCE_LEN + 1), "longer than"),
    ],
)
def test_what_is_refused_in_one_line(compiler, kind, source, words) -> None:
    with pytest.raises(GrammarError, match=words) as refused:
        compile_one(compiler, kind, source)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 300


def nasty() -> dict[str, tuple[str, str]]:
    """Structured outputs that are meant to take for ever, or all the memory there is."""
    deep: dict = {"type": "string"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep, "b": deep}}
        if len(json.dumps(deep)) > grammar_compiler.MAX_SOURCE_LEN // 2:
            break
    options = [{"properties": {f"k{number}": {"type": "integer"}}} for number in range(5)]
    node = {"properties": {name: {"$ref": "#/$defs/n"} for name in "abcdefgh"}}
    return {
        "deep": ("json_schema", json.dumps(deep)),
        "product of options": ("json_schema", json.dumps({"allOf": [{"anyOf": options}] * 9})),
        "recursion": ("json_schema", json.dumps({"$defs": {"n": node}, "$ref": "#/$defs/n"})),
        "many values": ("json_schema", json.dumps({"enum": [f"v {n}" for n in range(9000)]})),
        "multiples": ("json_schema", '{"type": "integer", "multipleOf": 99991}'),
        "long": ("json_schema", '{"type": "string", "minLength": 100000, "maxLength": 1000000}'),
        "repeats": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
        "exponential": ("regex", "[ab]*a[ab]{30}c"),
        "backtracking": ("regex", "(a*)*(a|a)*(.*b.{40}){9}"),
        "alternatives": ("regex", "|".join(f"(a*{number})*b" for number in range(9000))),
        "ambiguous": ("grammar", 'start: a\na: a a | a a a | "x" | b a b\nb: a b | "y" |'),
        "left recursion": ("grammar", "start: start start | start |"),
    }


@pytest.mark.parametrize("name", nasty())
def test_a_nasty_structure_holds_nobody_up(name: str) -> None:
    """It compiles or is refused within the time that a request waits, and so does each mask.

    On a busy machine the processes that try it out, which stand back, may take several times the
    two seconds of processor time that they have. Masks are limited by llguidance itself; the time
    allowed here leaves room for a busy machine too."""
    compiler = GrammarCompiler(ByteTokenizer())
    compile_one(compiler, "json_object")
    started = time.monotonic()
    try:
        guide = compile_one(compiler, *nasty()[name]).start()
    except (GrammarError, SandboxBusyError):
        guide = None
    assert time.monotonic() - started < 2.0 * SLACK + 5.0
    for _ in range(50 if guide else 0):
        started = time.monotonic()
        allowed = int.from_bytes(guide.allowed(), "little")
        assert time.monotonic() - started < 1.0
        if guide.accept(next(token for token in range(257) if allowed >> token & 1)):
            break
        if guide.error:
            break


def test_equal_structures_are_compiled_once_and_old_ones_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED", 3)
    compiler = GrammarCompiler(ByteTokenizer())
    regex = [StructuredOutput("regex", f"a{{{number}}}") for number in range(5)]
    first = compiler.submit(regex[0])
    assert compiler.submit(StructuredOutput("regex", "a{0}")) is first
    first.result(60)
    for structured_output in (*regex[1:3], regex[0], regex[3]):  # regex[1] is now the oldest
        compiler.submit(structured_output).result(60)
    assert compiler.submit(regex[0]) is first
    assert len(compiler._cache) == 3 and regex[1] not in compiler._cache
    failed = compiler.submit(StructuredOutput("regex", "("))
    assert failed.exception(60)
    assert compiler.submit(StructuredOutput("regex", "(")) is failed and failed.exception()


def test_compiling_happens_in_threads_of_its_own(monkeypatch) -> None:
    names: list[str] = []

    def compile_slowly(structured_output: StructuredOutput, has_llama_tag: bool) -> str:
        names.append(threading.current_thread().name)
        raise ValueError("enough")

    monkeypatch.setattr(grammar, "_to_llguidance", compile_slowly)
    with pytest.raises(GrammarError, match="enough"):
        GrammarCompiler(ByteTokenizer()).submit(StructuredOutput("json_object")).result(20)
    assert names[0].startswith("grammar")


def submit(bench: Bench, name: str, compiled: CompiledGrammar, **params) -> None:
    params = SamplingParams(structured_output=StructuredOutput("regex", "-"), **params)
    bench.engine.submit(Request(name, (1, 2), params, time.monotonic(), grammar=compiled))


def test_an_answer_ends_when_it_is_complete_and_its_last_token_shows(compiler, monkeypatch) -> None:
    # On a busy machine a mask may seem slow; whoever waits for one may not need to be preempted.
    monkeypatch.setattr(grammar_guide, "SLOW_SECONDS", 1e9)
    compiled = compile_one(compiler, "regex", "xy{30}z")
    compiled.is_slow = False
    bench = Bench(FakeRunner(num_blocks=6), max_num_seqs=3)
    for number in range(4):  # the same grammar at several places at once, beside free ones
        params = {"max_tokens": 40, "ignore_eos": number % 2 == 0, "stop": ("n",)}
        submit(bench, f"s{number}", compiled, **params)
        bench.submit(f"f{number}", prompt="x" * 20, max_tokens=40)
    submit(bench, "cut", compiled, max_tokens=3)
    bench.run()
    for number in range(4):
        assert bench.text(f"s{number}") == "x" + "y" * 30 + "z"
        assert bench.last(f"s{number}").finish_reason == "stop"
        assert len(bench.tokens(f"f{number}")) == 40
    assert (bench.text("cut"), bench.last("cut").finish_reason) == ("xyy", "length")
    assert bench.engine.stats().num_preemptions
    bench.assert_clean()


def test_an_end_token_ends_where_more_might_come(compiler) -> None:
    def digits_then_end(context, sample):
        return ord("7") if len(context) < 5 else EOS

    for ignore_eos in (False, True):
        bench = Bench(FakeRunner(next_token=digits_then_end))
        digits = compile_one(compiler, "regex", "[0-9]+")
        submit(bench, "a", digits, max_tokens=9, ignore_eos=ignore_eos)
        bench.run()
        assert (bench.text("a"), bench.last("a").finish_reason) == ("777", "stop")


def test_a_structure_that_cannot_be_followed_ends_its_request_alone() -> None:
    class GivesUp:
        error = None
        is_ready = True

        def start(self):
            return self

        def allowed(self, num_ahead: int = 0) -> bytes:
            return b"\xff" * 36

        def accept(self, token_id: int) -> bool:
            self.error = "too complex"
            return True

    bench = Bench()
    submit(bench, "a", GivesUp(), max_tokens=9)
    bench.submit("b", max_tokens=9)
    bench.run()
    last = bench.last("a")
    assert (last.finish_reason, last.error, last.token_ids) == ("error", "too complex", ())
    assert len(bench.tokens("b")) == 9
    bench.assert_clean()


def test_min_tokens_and_a_structure_contradict_each_other() -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(structured_output=StructuredOutput("json_object"), min_tokens=3)
    assert refused.value.field_name == "min_tokens"


class SlowGuide:
    """Any letter may come; each completion is as slow as the test likes."""

    error = None

    def __init__(self) -> None:
        self.is_ready = True
        self.num_waited = 0

    def wait(self, seconds: float) -> None:
        self.num_waited += 1
        self.is_ready = True

    def start(self) -> SlowGuide:
        return self

    def allowed(self, num_ahead: int = 0) -> bytes:
        assert self.is_ready
        return b"\xff" * 36

    def accept(self, token_id: int) -> bool:
        self.is_ready = False
        return False


def test_a_slow_structure_holds_up_itself_and_nobody_else() -> None:
    guide = SlowGuide()
    bench = Bench()
    submit(bench, "slow", guide, max_tokens=5)
    bench.submit("quick", max_tokens=20)
    for _ in range(20):
        bench.engine.step()
    assert len(bench.tokens("quick")) == 20 and guide.num_waited == 0
    assert len(bench.tokens("slow")) == 1  # the rest of the batch never waited for its second
    bench.run()  # alone, it is waited for
    assert len(bench.tokens("slow")) == 5 and guide.num_waited == 4
    bench.assert_clean()


def test_a_slow_structure_goes_on_when_it_is_ready_and_can_be_preempted_or_left() -> None:
    guides = [SlowGuide() for _ in range(3)]
    bench = Bench(FakeRunner(num_blocks=8), max_num_seqs=6)
    for number, guide in enumerate(guides):
        submit(bench, f"s{number}", guide, max_tokens=60)
        bench.submit(f"f{number}", prompt="x" * 20, max_tokens=60)
    for number in range(80):
        for guide in guides[number % 3 :]:
            guide.is_ready = True
        bench.engine.step()
    bench.engine.abort("s1")
    bench.run()
    assert bench.engine.stats().num_preemptions
    assert [len(bench.tokens(name)) for name in ("s0", "s2", "f0", "f1", "f2")] == [60] * 5
    bench.assert_clean()


def test_what_is_computed_in_a_thread_is_what_is_computed_at_once(monkeypatch) -> None:
    schema = '{"type": "array", "items": {"type": "integer"}, "maxItems": 4}'
    told = []
    for seconds in (1000.0, -1.0):
        monkeypatch.setattr(grammar_guide, "SLOW_SECONDS", seconds)
        compiled = compile_one(GrammarCompiler(ByteTokenizer()), "json_schema", schema)
        guide = compiled.start()
        masks = []
        for byte in b"[1, 22,3]":
            masks.append(guide.allowed())
            is_complete = guide.accept(byte)
        told.append((masks, is_complete))
        assert compiled.is_slow == (seconds < 0)
    assert told[0] == told[1] and told[0][1]


class StuckMatcher:
    """Thinks about its second token for ever, as far as anyone can tell."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def deep_copy(self) -> StuckMatcher:
        return self

    def compute_bitmask(self) -> bytes:
        self.gate.wait(30)
        return b"\xff" * 36

    def consume_token(self, token_id: int) -> bool:
        return True

    def is_error(self) -> bool:
        return False

    is_stopped = is_error


def test_what_comes_first_is_known_and_holds_nobody_up(compiler) -> None:
    """To compute it for each completion took the engine's thread as long as compiling did."""
    compiled = compiler.submit(StructuredOutput("regex", "[a-c]{3}x")).result(60)
    matcher = compiled._matcher.deep_copy()
    assert matcher.compute_bitmask() == compiled.first_mask

    stuck = CompiledGrammar(StuckMatcher(), compiled.first_mask, ShortestFirst(1, "slow"))
    assert stuck.start().allowed() == compiled.first_mask


def test_a_mask_that_takes_too_long_ends_its_request_and_no_other(monkeypatch) -> None:
    monkeypatch.setattr(grammar_guide, "MAX_TOO_SLOW_SECONDS", 0.2)
    matcher = StuckMatcher()
    slow_pool = ShortestFirst(1, "slow")
    compiled = CompiledGrammar(matcher, b"\xff" * 36, slow_pool, is_slow=True)
    bench = Bench(FakeRunner(delay=0.01))
    submit(bench, "stuck", compiled, max_tokens=9)
    bench.submit("quick", max_tokens=40)
    started = time.monotonic()
    bench.run()
    matcher.gate.set()
    assert time.monotonic() - started < 5.0
    last = bench.last("stuck")
    assert (last.finish_reason, last.error) == ("error", grammar_guide.TOO_SLOW)
    assert last.error_code == "structure_too_complex"
    assert len(bench.tokens("quick")) == 40
    bench.assert_clean()


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize(
    "method", ["deep_copy", "compute_bitmask", "consume_token", "is_error", "is_stopped"]
)
def test_a_panic_while_an_answer_is_followed_ends_its_request_alone(
    method: str, is_slow: bool
) -> None:
    class PanicException(BaseException):
        pass

    def fail(*_: object) -> None:
        raise PanicException("index out of bounds")

    matcher = StuckMatcher()
    matcher.gate.set()
    setattr(matcher, method, fail)
    slow_pool = ShortestFirst(1, "slow")
    bench = Bench()
    submit(bench, "a", CompiledGrammar(matcher, b"\xff" * 36, slow_pool, is_slow=is_slow))
    bench.submit("b", max_tokens=9)
    bench.run()
    assert (bench.last("a").finish_reason, bench.last("a").error) == ("error", UNFOLLOWABLE)
    assert bench.last("a").error_code == "structure_too_complex"
    assert len(bench.tokens("b")) == 9
    bench.assert_clean()


def test_refusals_push_out_no_grammar_and_heavy_grammars_each_other(monkeypatch) -> None:
    compiler = GrammarCompiler(ByteTokenizer())
    kept = StructuredOutput("regex", "a{3}")
    compiler.submit(kept).result(60)
    for number in range(grammar_compiler.MAX_CACHED + 5):
        compiler.submit(StructuredOutput("choice", f"[{number}"))  # no JSON
    assert kept in compiler._cache
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_BYTES", 2 * grammar.MIN_GRAMMAR_BYTES)
    for number in range(4):
        compiler.submit(StructuredOutput("choice", f'["{number}"]')).result(60)
    assert len(compiler._cache) <= 3 and kept not in compiler._cache
    monkeypatch.setattr(grammar_compiler, "MAX_HELD_BYTES", grammar.MIN_GRAMMAR_BYTES)
    held = compiler.submit(StructuredOutput("choice", '["held"]')).result(60)
    with pytest.raises(SandboxBusyError):
        compiler.submit(StructuredOutput("choice", '["more"]')).result(60)
    del held


@pytest.mark.parametrize(("kind", "source"), [
    ("json_schema", IN_ORDER), ("json_schema", ANY_MORE), ("regex", "x{20}[ab]{2,5}(yes|yet)?"),
    ("choice", '["an answer", "an end"]'),
])  # fmt: skip
def test_looking_ahead_tells_what_would_be_told_later_and_changes_nothing(
    compiler, kind: str, source: str, monkeypatch
) -> None:
    monkeypatch.setattr(grammar_guide, "SLOW_SECONDS", 1e9)
    compiled = compile_one(compiler, kind, source)
    compiled.is_slow = False
    rng = random.Random(5)
    num_ahead = 0
    for _ in range(20):
        guide, plain = compiled.start(), compiled.start()
        while True:
            guesses = rng.choices(b'xaby{"1es', k=rng.randint(0, 3))
            found = guide.look_ahead(guesses, rng.randint(0, 6))
            masks = [guide.allowed(number) for number in range(len(found) + 1)]
            num_ahead += len(found)
            bits = int.from_bytes(masks[0], "little")
            token = rng.choice([one for one in range(EOS + 1) if bits >> one & 1])
            taken = [*found[: rng.randint(0, len(found))]] or [token]
            is_complete = False
            for number, one in enumerate(taken):
                assert plain.allowed() == masks[number]
                is_complete = guide.accept(one)
                assert plain.accept(one) == is_complete
                assert guide.error is plain.error is None
            if is_complete or len(guide._accepted) > 60:
                break
    assert num_ahead > 50
    assert guide._can_look_ahead


def test_a_look_ahead_that_breaks_leaves_the_completion_as_it_was(compiler) -> None:
    guide = compile_one(compiler, "regex", "ab+cde").start()
    for token in b"ab":
        guide.accept(token)
    broken = SimpleNamespace(is_error=iter((False, True)).__next__, consume_token=lambda _: False)
    assert guide.allowed()
    guide._matcher = broken
    assert guide.look_ahead(b"bb", 2) == []
    assert [guide.accept(token) for token in b"bcde"] == [False, False, False, True]
