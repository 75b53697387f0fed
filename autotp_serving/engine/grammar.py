"""Structured output: grammars compiled once, then followed token by token. Rank 0 and its helpers.

The one file that knows llguidance, imported when the first structured output is asked for. Of the
well-kept libraries it alone depends on nothing (xgrammar wants a triton of its own beside torch's),
gives up the interpreter's lock while it works, and limits what a grammar may cost. Those limits
have holes (a chain of references overflows its stack, a multiple takes minutes), so what is not
known to be simple is compiled and followed for a few tokens by a process that may die of it
(`sandbox`), before rank 0 does the same (`grammar_compiler`).
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from autotp_serving.engine.sandbox import list_vocabulary
from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.engine.tokenizer import Tokenizer, is_panic
from autotp_serving.engine.tool_grammar import LLAMA_TAG, arguments_schema, write_calls
from autotp_serving.structured_output import StructuredOutput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MIN_GRAMMAR_BYTES = 2**20

MAX_LEXER_STATES = 50_000
"""One to two kilobytes each."""

SLOW_SECONDS = 0.001
"""A grammar that once took longer to tell the next tokens does so in a thread from then on."""

MAX_TOO_SLOW_SECONDS = 2.0
"""A completion ends whose next tokens take longer to tell."""

NUM_TRIED_TOKENS = 24
TRIED_SECONDS = 0.02
"""A helper follows a grammar for so many tokens, or until that time is over."""

TRIED_SLOW_SECONDS = 0.005
"""More than SLOW_SECONDS, since a process just forked is slow in all it does first."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between JSON tokens. Bounded, because weak models fall into writing blanks for ever."""

JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": WHITESPACE}

REASONING = {
    "begun": r"start: reasoning /[ \n]{0,4}/ @answer",
    "possible": r'start: ("<think>" reasoning /[ \n]{0,4}/)? @answer',
}
END_OF_REASONING = r'reasoning[lazy]: /(.|\n)*/ "</think>"'

TOO_COMPLEX = (
    "the structured output became too complex to follow in this completion: make it simpler"
)
TOO_SLOW = "the structured output takes too long to follow in this completion: make it simpler"
PANIC = "is more than the grammar library can take: make it smaller or simpler"


class GrammarError(ValueError):
    """A structured output that cannot be compiled; the message says why, in one line.

    Args:
        is_certain: see SandboxError.
    """

    def __init__(self, message: str, *, is_certain: bool = True) -> None:
        super().__init__(message)
        self.is_certain = is_certain


class Vocabulary:
    """A tokenizer's tokens in llguidance's form.

    Args:
        tokens: bytes of each token id.
        special_token_ids: tokens that stand for no text.
        eos_token_ids: tokens that end a text.
        encode: tokenizes a text; None takes the longest tokens that match, which is good enough to
            try a structured output out.
    """

    def __init__(
        self,
        tokens: list[bytes],
        special_token_ids: list[int],
        eos_token_ids: list[int],
        encode: Any = None,
    ) -> None:
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = min(eos_token_ids)
        self._encode = encode or self._match_longest
        self._ids = {} if encode else {text: token for token, text in enumerate(tokens)}
        self._longest = max(map(len, tokens))
        self._lock = threading.Lock()
        self._loaded: Any = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer."""
        return cls(**list_vocabulary(tokenizer), encode=partial(_encode_plain, tokenizer))

    @property
    def has_llama_tag(self) -> bool:
        """True if Llama 3's special token for calls is there."""
        return LLAMA_TAG.encode() in (self.tokens[token] for token in self.special_token_ids)

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def _match_longest(self, text: str) -> list[int]:
        """A text in the longest tokens that there are; bytes that no token has are left out."""
        data = text.encode()
        token_ids = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token = self._ids.get(data[start:end])
                if token is not None:
                    token_ids.append(token)
                    break
            else:
                end = start + 1
            start = end
        return token_ids

    def load(self) -> Any:
        """llguidance's tokenizer, made once: about a second for 128 K tokens."""
        import llguidance

        with self._lock:
            if self._loaded is None:
                self._loaded = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(self),
                    n_vocab=len(self.tokens),
                    eos_token=self.eos_token_ids,
                )
            return self._loaded


def _encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's tokens. Those that the model does not have are spelled, byte by byte."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if max(tokens, default=0) < tokenizer.vocab_size:
        return tokens
    byte_tokens = {
        piece[0]: token
        for token in range(tokenizer.vocab_size)
        if len(piece := tokenizer.token_bytes(token)) == 1
    }
    spelled: list[int] = []
    for token in tokens:
        if token < tokenizer.vocab_size:
            spelled.append(token)
        else:
            known = map(byte_tokens.get, tokenizer.token_bytes(token))
            spelled.extend(one for one in known if one is not None)
    return spelled


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
    for index in (*range(start, len(mask)), *range(start)):
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


class CompiledGrammar:
    """See Grammar.

    Args:
        matcher: at the beginning of a completion.
        first_mask: what may come there.
        slow_pool: where masks are computed once one of them was slow.
        is_slow: one was.
        num_bytes: of memory, roughly.
    """

    def __init__(
        self,
        matcher: Any,
        first_mask: bytes,
        slow_pool: ShortestFirst,
        *,
        is_slow: bool = False,
        num_bytes: int = 0,
    ) -> None:
        self.first_mask = first_mask
        self.is_slow = is_slow
        self.slow_pool = slow_pool
        self.num_bytes = num_bytes
        self._matcher = matcher

    def start(self) -> MatcherGuide:
        """See Grammar."""
        return MatcherGuide(self, self._matcher.deep_copy())


class MatcherGuide:
    """See Guide. What takes long happens while the completion sits out a step, others do not.

    A completion whose next tokens are not known in time ends: it is told that only those of its
    beginning may come, and `accept` says why. A panic of the library is left to whoever asks.

    Args:
        grammar: what is followed.
        matcher: at the beginning of the completion, its own.
    """

    def __init__(self, grammar: CompiledGrammar, matcher: Any) -> None:
        self.error: str | None = None
        self._grammar = grammar
        self._matcher = matcher
        self._mask: Future[bytes] | None = None
        self._started: float | None = None

    @property
    def is_ready(self) -> bool:
        """See Guide."""
        if self._mask is None or self._mask.done():
            return True
        if self._started is not None and time.monotonic() - self._started > MAX_TOO_SLOW_SECONDS:
            self.error = TOO_SLOW
        return self.error is not None

    def wait(self, seconds: float) -> None:
        """See Guide."""
        if self._mask is not None and not self.is_ready:
            wait([self._mask], seconds)

    def allowed(self) -> bytes:
        """See Guide. A matcher that gave up allows the end tokens, and `accept` tells."""
        if self.error is not None:
            return self._grammar.first_mask
        if self._mask is not None:
            return self._mask.result()
        started = time.thread_time()
        mask = self._compute()
        if time.thread_time() - started > SLOW_SECONDS:
            self._grammar.is_slow = True
        return mask

    def accept(self, token_id: int) -> bool:
        """See Guide."""
        self._mask = self._started = None
        if self.error is not None:
            return True
        if self._matcher.is_error() or not self._matcher.consume_token(token_id):
            self.error = TOO_COMPLEX
        is_complete: bool = self._matcher.is_stopped()
        if self._grammar.is_slow and not is_complete and self.error is None:
            self._mask = self._grammar.slow_pool.submit(0, self._compute)
        return is_complete

    def _compute(self) -> bytes:
        """The next tokens, in this thread."""
        self._started = time.monotonic()
        mask: bytes = self._matcher.compute_bitmask()
        return mask


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
        lark = write_calls(calls, has_content=bool(grammars), has_llama_tag=has_llama_tag)
        grammars.insert(0, {"name": "answer", "lark_grammar": lark})
        for number, tool in enumerate(calls.tools):
            schema = arguments_schema(tool)
            grammars.append({"name": f"arguments_{number}", "json_schema": schema})
    if structured_output.reasoning is not None:
        lark = f"{REASONING[structured_output.reasoning]}\n{END_OF_REASONING}"
        grammars.insert(0, {"name": "reasoning", "lark_grammar": lark})
    return json.dumps({"grammars": grammars})


def _content(structured_output: StructuredOutput) -> dict[str, Any]:
    """One grammar in llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if structured_output.kind in ("json_object", "json_schema"):
        source = structured_output.source or '{"type": "object"}'
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
