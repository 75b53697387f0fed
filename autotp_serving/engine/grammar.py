"""Structured output: grammars compiled once, then followed token by token. Rank 0 only.

The one file that knows llguidance, imported when the first structure is asked for. Of the well-kept
libraries it alone depends on nothing (xgrammar wants a triton of its own beside torch's), gives up
the interpreter's lock while it works, and limits what a grammar may cost. Nobody can stop a thread,
so those limits are what keeps a nasty schema from holding up the server.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

from autotp_serving.engine.tool_grammar import LLAMA_TAG, arguments_schema, write_calls
from autotp_serving.structure import Structure
from autotp_serving.tokenizer import Tokenizer

MAX_SOURCE_LEN = 2**17
"""Characters of a schema, expression or grammar, those of tools included."""

MAX_CACHED = 64
"""Compiled grammars kept; the least recently used one goes."""

NUM_THREADS = 2

SLOW_SECONDS = 0.001
"""A grammar that once took longer to tell the next tokens does so in a thread from then on."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between JSON tokens. Bounded, because weak models fall into writing blanks for ever."""

JSON_OPTIONS = {"whitespace_pattern": WHITESPACE}

THOUGHTS = {
    "begun": r"start: thoughts /[ \n]{0,4}/ @answer",
    "possible": r'start: ("<think>" thoughts /[ \n]{0,4}/)? @answer',
}
END_OF_THOUGHTS = r'thoughts[lazy]: /(.|\n)*/ "</think>"'

TOO_COMPLEX = "the structure became too complex to follow in this answer"


class GrammarError(ValueError):
    """A structure that cannot be compiled; the message says why, in one line."""


class GrammarCompiler:
    """Compiles structures in threads of its own and remembers the results, failures included.

    Args:
        tokenizer: whose tokens the answers are made of.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()  # two threads need it at once, it is made once
        self._cache: OrderedDict[Structure, Future[CompiledGrammar]] = OrderedDict()
        special = map(tokenizer.token_bytes, tokenizer.special_token_ids)
        self._has_llama_tag = LLAMA_TAG.encode() in special
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        # One thread: slow grammars share a core, whatever they are and however many.
        self._slow_pool = ThreadPoolExecutor(1, thread_name_prefix="slow-grammar")

    def submit(self, structure: Structure) -> Future[CompiledGrammar]:
        """Begin to compile; the future raises GrammarError if that fails. Safe in any thread."""
        tools = structure.calls.tools if structure.calls else ()
        if len(structure.source) + sum(len(tool.schema) for tool in tools) > MAX_SOURCE_LEN:
            refusal: Future[CompiledGrammar] = Future()  # not kept, since it may be megabytes
            refusal.set_exception(GrammarError(f"is longer than {MAX_SOURCE_LEN} characters"))
            return refusal
        with self._lock:
            future = self._cache.get(structure)
            if future is None:
                future = self._cache[structure] = self._pool.submit(self._compile, structure)
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(structure)
            return future

    @cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer in llguidance's form: about a second for 128 K tokens."""
        import llguidance

        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer)),
            n_vocab=self._tokenizer.vocab_size,
            eos_token=sorted(self._tokenizer.eos_token_ids),
        )

    def _compile(self, structure: Structure) -> CompiledGrammar:
        import llguidance

        if not self._tokenizer.eos_token_ids:
            raise GrammarError("cannot be kept to: the model has no token that ends a text")
        try:
            text = _to_llguidance(structure, self._has_llama_tag)
        except ValueError as error:
            raise GrammarError(_first_line(str(error))) from error
        with self._vocabulary_lock:
            vocabulary = self._vocabulary
        matcher = llguidance.LLMatcher(
            vocabulary, text, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False)
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask is the slowest: not in the engine's thread
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return CompiledGrammar(matcher, self._slow_pool)


class CompiledGrammar:
    """See Grammar.

    Args:
        matcher: at the beginning of an answer.
        slow_pool: where masks are computed once one of them was slow.
    """

    def __init__(self, matcher: Any, slow_pool: ThreadPoolExecutor) -> None:
        self.is_slow = False
        self.slow_pool = slow_pool
        self._matcher = matcher

    def start(self) -> MatcherGuide:
        """See Grammar."""
        return MatcherGuide(self, self._matcher.deep_copy())


class MatcherGuide:
    """See Guide. What takes long happens while the answer before sits out a step, others do not."""

    def __init__(self, grammar: CompiledGrammar, matcher: Any) -> None:
        self.error: str | None = None
        self._grammar = grammar
        self._matcher = matcher
        self._mask: Future[bytes] | None = None

    @property
    def is_ready(self) -> bool:
        """See Guide."""
        return self._mask is None or self._mask.done()

    def allowed(self) -> bytes:
        """See Guide. A matcher that gave up allows the end tokens, and `accept` tells."""
        if self._mask is not None:
            return self._mask.result()
        started = time.thread_time()
        mask = self._matcher.compute_bitmask()
        if time.thread_time() - started > SLOW_SECONDS:
            self._grammar.is_slow = True
        return mask

    def accept(self, token_id: int) -> bool:
        """See Guide."""
        if self._matcher.is_error() or not self._matcher.consume_token(token_id):
            self.error = TOO_COMPLEX
        is_complete = self._matcher.is_stopped()
        self._mask = None
        if self._grammar.is_slow and not is_complete and self.error is None:
            self._mask = self._grammar.slow_pool.submit(self._matcher.compute_bitmask)
        return is_complete


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if max(tokens, default=0) < len(self.tokens):
            return tokens
        # The tokenizer may know more tokens than the model. Those are spelled, byte by byte.
        spelled: list[int] = []
        for token in tokens:
            if token < len(self.tokens):
                spelled.append(token)
            else:
                known = map(self._byte_tokens.get, self._tokenizer.token_bytes(token))
                spelled.extend(one for one in known if one is not None)
        return spelled

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        return {piece[0]: token for token, piece in enumerate(self.tokens) if len(piece) == 1}


def _to_llguidance(structure: Structure, has_llama_tag: bool) -> str:
    """The structure in llguidance's own form: grammars that refer to each other by name.

    Raises ValueError.
    """
    calls = structure.calls
    grammars: list[dict[str, Any]] = []
    if structure.kind != "text" and not (calls and calls.is_required):
        grammars.append(_content(structure) | {"name": "content" if calls else "answer"})
    if calls is not None:
        lark = write_calls(calls, has_content=bool(grammars), has_llama_tag=has_llama_tag)
        grammars.insert(0, {"name": "answer", "lark_grammar": lark})
        for number, tool in enumerate(calls.tools):
            schema = arguments_schema(tool)
            grammars.append({"name": f"arguments_{number}", "json_schema": schema})
    if structure.thoughts is not None:
        lark = f"{THOUGHTS[structure.thoughts]}\n{END_OF_THOUGHTS}"
        grammars.insert(0, {"name": "thoughts", "lark_grammar": lark})
    return json.dumps({"grammars": grammars})


def _content(structure: Structure) -> dict[str, Any]:
    """One grammar in llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if structure.kind in ("json_object", "json_schema"):
        source = structure.source or '{"type": "object"}'
        return _only(LLMatcher.grammar_from_json_schema(source, defaults=JSON_OPTIONS))
    if structure.kind == "regex":
        return _only(LLMatcher.grammar_from_regex(structure.source))
    if structure.kind == "choice":
        texts = [json.dumps(text, ensure_ascii=False) for text in json.loads(structure.source)]
        return {"lark_grammar": "start: " + " | ".join(texts)}
    try:
        return {"lark_grammar": any_to_lark(structure.source)}
    except Exception as error:  # all that its parser of GBNF ever raises
        raise ValueError(str(error)) from error


def _only(grammars: str) -> dict[str, Any]:
    """The one grammar in a list that llguidance wrote."""
    (grammar,) = json.loads(grammars)["grammars"]
    return grammar


def _first_line(message: str) -> str:
    """llguidance's error without the state and the grammar that may follow."""
    lines = message.partition("<state>")[0].strip().splitlines()
    return " ".join(line.strip() for line in lines if line.strip(" ^|0123456789"))[:300]
