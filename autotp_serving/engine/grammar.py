"""Structured output: written as grammars, tried and compiled. Rank 0 and its helper processes.

This file and `vocabulary` know llguidance, which is imported when the first structured output is
asked for. Of the well-kept libraries it alone depends on nothing (xgrammar wants a triton of its
own beside torch's), gives up the interpreter's lock while it works, and limits what a grammar may
cost. Those limits have holes (a chain of references overflows its stack, a multiple takes minutes),
so what is not known to be simple is compiled and followed for a few tokens by a process that may
die of it (`sandbox`), before rank 0 does the same (`grammar_compiler`).
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from autotp_serving.engine.json_schema import close_objects
from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES
from autotp_serving.engine.tokenizer import is_panic
from autotp_serving.engine.tool_grammar import write_calls
from autotp_serving.engine.vocabulary import Vocabulary
from autotp_serving.structured_output import StructuredOutput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MIN_GRAMMAR_BYTES = 2**20

MAX_LEXER_STATES = 50_000
"""One to two kilobytes each."""

NUM_TRIED_TOKENS = 24
TRIED_SECONDS = 0.02
"""A helper follows a grammar for so many tokens, or until that time is over."""

TRIED_SLOW_SECONDS = 0.005
"""More than the guide's SLOW_SECONDS, since a process just forked is slow in all it does first."""

JSON_OPTIONS: JsonCompileOptions = {"whitespace_flexible": False}
"""Compact: each blank between JSON tokens costs a step, and weak models write them for ever."""

PANIC = "is more than the grammar library can take: make it smaller or simpler"


class GrammarError(ValueError):
    """A structured output that cannot be compiled; the message says why, in one line.

    Args:
        is_certain: see SandboxError.
    """

    def __init__(self, message: str, *, is_certain: bool = True) -> None:
        super().__init__(message)
        self.is_certain = is_certain


@dataclass(frozen=True)
class Trial:
    """What a helper process found out about a structured output that it could compile.

    Attributes:
        text: the structured output in llguidance's own form.
        seconds: of processor time that compiling took.
        num_bytes: of memory that the compiled grammar takes, roughly.
        is_slow: telling the next tokens took long.
    """

    text: str
    seconds: float = 0.0
    num_bytes: int = MIN_GRAMMAR_BYTES
    is_slow: bool = False


def try_structure(vocabulary: Vocabulary, structured_output: StructuredOutput) -> dict[str, Any]:
    """Compile a structured output and follow it for a few tokens, in a helper process.

    Returns the fields of a Trial. Raises GrammarError.
    """
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    text = write_structure(structured_output, vocabulary)
    matcher, _ = compile_text(vocabulary, text)
    seconds = time.process_time() - started
    matcher = matcher.deep_copy()
    slowest = 0.0
    for number in range(NUM_TRIED_TOKENS):
        mask_started = time.process_time()
        mask = matcher.compute_bitmask()
        now = time.process_time()
        slowest = max(slowest, now - mask_started)
        token = _pick(mask, number)
        if token is None or now - started - seconds > TRIED_SECONDS:
            break
        if not matcher.consume_token(token) or matcher.is_stopped():
            break
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "text": text,
        "seconds": seconds,
        "num_bytes": grown * 1024 + MIN_GRAMMAR_BYTES,
        "is_slow": slowest > TRIED_SLOW_SECONDS,
    }


def _pick(mask: bytes, number: int) -> int | None:
    """Some token that a mask allows, another one for each number."""
    start = number * 7919 % len(mask)
    for index in chain(range(start, len(mask)), range(start)):
        if mask[index]:
            return index * 8 + (mask[index].bit_length() - 1)
    return None


def compile_text(vocabulary: Vocabulary, text: str) -> tuple[Any, bytes]:
    """A matcher at the beginning of a completion, and its first mask. Raises GrammarError."""
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
    try:
        matcher = llguidance.LLMatcher(vocabulary.load(), text, log_level=0, limits=limits)
        # The first mask is the slowest: not in the engine's thread.
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    except BaseException as error:
        if is_panic(error):
            raise GrammarError(PANIC) from error
        raise
    if matcher.is_error():
        raise GrammarError(_first_line(matcher.get_error()))
    return matcher, mask


def write_structure(structured_output: StructuredOutput, vocabulary: Vocabulary) -> str:
    """The structured output in llguidance's own form. Raises GrammarError."""
    try:
        return _to_llguidance(structured_output, vocabulary.has_llama_tag)
    except BaseException as error:
        if is_panic(error) or isinstance(error, RecursionError):
            raise GrammarError(PANIC) from error
        if isinstance(error, ValueError):
            raise GrammarError(_first_line(str(error))) from error
        raise


def _to_llguidance(structured_output: StructuredOutput, has_llama_tag: bool) -> str:
    """The structured output in llguidance's own form: grammars that refer to each other by name.

    Raises ValueError.
    """
    calls = structured_output.calls
    grammars: list[dict[str, Any]] = []
    if structured_output.kind != "text" and not (calls and calls.is_required):
        grammars.append(_content(structured_output) | {"name": "content" if calls else "answer"})
    if calls is not None:
        lark, more = write_calls(calls, has_content=bool(grammars), has_llama_tag=has_llama_tag)
        grammars.insert(0, {"name": "answer", "lark_grammar": lark})
        grammars += more
    if structured_output.reasoning is not None:
        lark = _write_reasoning(structured_output)
        grammars.insert(0, {"name": "reasoning", "lark_grammar": lark})
    return json.dumps({"grammars": grammars})


def _write_reasoning(structured_output: StructuredOutput) -> str:
    """Rules of a completion that may begin with reasoning; `@answer` is the rest of it."""
    syntax = REASONING_SYNTAXES[structured_output.reasoning_format]
    opening, closing, after = map(json.dumps, (syntax.open, syntax.close, syntax.next))
    blanks = f"{after} " if syntax.next else r"/[ \n]{0,4}/ "
    head = ""
    if syntax.answer and structured_output.calls is None:
        head = f"{json.dumps(syntax.answer)} "
    start = f"reasoning {blanks}"
    if structured_output.reasoning == "possible":
        start = f"({opening} {start})? "
    lazy = f"reasoning[lazy]: /(.|\\n)*/ {closing}"
    return f"start: {start}{head}@answer\n{lazy}"


def _content(structured_output: StructuredOutput) -> dict[str, Any]:
    """One grammar in llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if structured_output.kind in ("json_object", "json_schema"):
        source = structured_output.source or '{"type": "object"}'
        with suppress(json.JSONDecodeError):  # the library says what is wrong with it
            source = json.dumps(close_objects(json.loads(source)))
        return _only(LLMatcher.grammar_from_json_schema(source, defaults=JSON_OPTIONS))
    if structured_output.kind == "regex":
        return _only(LLMatcher.grammar_from_regex(structured_output.source))
    if structured_output.kind == "choice":
        texts = [
            json.dumps(text, ensure_ascii=False) for text in json.loads(structured_output.source)
        ]
        return {"lark_grammar": "start: " + " | ".join(texts)}
    try:
        return {"lark_grammar": any_to_lark(structured_output.source)}
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # all that its parser of GBNF ever raises
        raise ValueError(str(error)) from error


def _only(grammars: str) -> dict[str, Any]:
    """The one grammar in a list that llguidance wrote."""
    grammar: dict[str, Any]
    (grammar,) = json.loads(grammars)["grammars"]
    return grammar


def _first_line(message: str) -> str:
    """llguidance's error without the state and the grammar that may follow."""
    if "panic" in message.lower():
        return PANIC
    lines = message.partition("<state>")[0].strip().splitlines()
    return " ".join(line.strip() for line in lines if line.strip(" ^|0123456789"))[:300]
