"""Compiles structured outputs and remembers them, those that cannot be included. Rank 0 only.

What is not known to be simple is tried in the sandbox; this process repeats only what passed there,
in threads with more stack.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial
from typing import Any

from autotp_serving.engine.grammar import (
    PANIC,
    GrammarError,
    Trial,
    compile_text,
    write_structure,
)
from autotp_serving.engine.grammar_guide import CompiledGrammar
from autotp_serving.engine.sandbox import Sandbox
from autotp_serving.engine.sandbox_helper import RefusalError, SandboxBusyError, SandboxError
from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.engine.simple_structure import is_simple
from autotp_serving.engine.tokenizer import Tokenizer, is_panic
from autotp_serving.engine.vocabulary import Vocabulary
from autotp_serving.structured_output import StructuredOutput, structure_to_plain

MAX_SOURCE_LEN = 2**17
"""Characters of a schema, expression or grammar, those of tools included."""

MAX_CACHED = 64
"""Compiled grammars kept; the least recently used one goes."""

MAX_REFUSALS = 1024
"""Structures remembered because they cannot be compiled."""

MAX_CACHED_BYTES = 256 * 2**20
MAX_HELD_BYTES = 1024 * 2**20
"""Memory of all compiled grammars: of those cached, and with those in use."""

NUM_THREADS = 2

STACK_BYTES = 64 * 2**20
"""Of the threads that compile; a helper process has an eighth and fails first."""

QUICK_SECONDS = 0.1
"""What took a helper longer is repeated by a thread that stands back for everyone else."""

SLOW_NICENESS = 10

OUT_OF_MEMORY = "grammars in use take all the memory that there is for them"


class GrammarCompiler:
    """Compiles structured outputs in threads of its own; remembers results, failures included.

    Args:
        tokenizer: whose tokens the completions are made of.
        sandbox: where structured outputs are tried; None makes one when it is needed.
        seconds: of processor time that compiling may take.
    """

    def __init__(
        self, tokenizer: Tokenizer, sandbox: Sandbox | None = None, seconds: float = 2.0
    ) -> None:
        self._lock = threading.Lock()
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary | None = None
        self._seconds = seconds
        self._sandbox = sandbox or Sandbox(tokenizer)
        self._pending: dict[StructuredOutput, Future[CompiledGrammar]] = {}
        self._cache: OrderedDict[StructuredOutput, Future[CompiledGrammar]] = OrderedDict()
        self._refused: OrderedDict[StructuredOutput, Future[CompiledGrammar]] = OrderedDict()
        self._active: weakref.WeakSet[CompiledGrammar] = weakref.WeakSet()
        self._pool = ShortestFirst(NUM_THREADS, "grammar", stack_bytes=STACK_BYTES)
        # Whatever takes long shares a core, and leaves it to others.
        self._late_pool = ShortestFirst(
            1, "late-grammar", stack_bytes=STACK_BYTES, niceness=SLOW_NICENESS
        )
        self._slow_pool = ShortestFirst(1, "slow-grammar", niceness=SLOW_NICENESS)

    def submit(self, structured_output: StructuredOutput) -> Future[CompiledGrammar]:
        """Begin to compile. Safe in any thread.

        The future raises GrammarError if that fails, and SandboxBusyError if it could not be tried.
        """
        size = len(structured_output.source)
        size += (
            sum(len(tool.schema) for tool in structured_output.calls.tools)
            if structured_output.calls
            else 0
        )
        if size > MAX_SOURCE_LEN:
            return _refuse(f"is longer than {MAX_SOURCE_LEN} characters")
        if not self._tokenizer.eos_token_ids:
            return _refuse("cannot be kept to: the model has no token that ends a text")
        with self._lock:
            if structured_output in self._pending:
                return self._pending[structured_output]
            for known in (self._refused, self._cache):
                if structured_output in known:
                    known.move_to_end(structured_output)
                    return known[structured_output]
            future = self._pending[structured_output] = Future()
        future.add_done_callback(partial(self._sort, structured_output))
        if is_simple(structured_output):
            self._finish(self._pool, size, partial(self._compile_simple, structured_output), future)
        else:
            plain = structure_to_plain(structured_output)
            trial = self._sandbox.submit("grammar", plain, size, self._seconds)
            trial.add_done_callback(partial(self._on_trial, size, future))
        return future

    def _on_trial(
        self, size: int, future: Future[CompiledGrammar], trial: Future[dict[str, Any]]
    ) -> None:
        """Repeat what a helper has done, now that it is known to end well."""
        error = trial.exception()
        if isinstance(error, RefusalError):
            future.set_exception(GrammarError(str(error)))
        elif isinstance(error, SandboxError):
            message = f"{error}: make it smaller or simpler"
            future.set_exception(GrammarError(message, is_certain=error.is_certain))
        elif error is not None:
            future.set_exception(error)
        else:
            done = Trial(**trial.result())
            pool = self._pool if done.seconds < QUICK_SECONDS else self._late_pool
            self._finish(pool, size, partial(self._compile, done), future)

    @staticmethod
    def _finish(pool: ShortestFirst, size: int, work: Any, future: Future[CompiledGrammar]) -> None:
        def copy(done: Future[CompiledGrammar]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(GrammarError(PANIC) if is_panic(error) else error)

        pool.submit(size, work).add_done_callback(copy)

    def _sort(self, structured_output: StructuredOutput, future: Future[CompiledGrammar]) -> None:
        """Keep refusals apart, so that they push out no grammar; forget those for want of time."""
        error = future.exception()
        with self._lock:
            del self._pending[structured_output]
            if isinstance(error, GrammarError) and error.is_certain:
                self._refused[structured_output] = future
                if len(self._refused) > MAX_REFUSALS:
                    self._refused.popitem(last=False)
            elif error is None:
                self._cache[structured_output] = future
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
                self._shrink(MAX_CACHED_BYTES)

    def _shrink(self, max_bytes: int) -> None:
        """Let go of cached grammars, the oldest first, until the others fit."""
        total = sum(one.result().num_bytes for one in self._cache.values())
        while total > max_bytes:
            _, oldest = self._cache.popitem(last=False)
            total -= oldest.result().num_bytes

    def _find_vocabulary(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary.of(self._tokenizer)
            return self._vocabulary

    def _compile_simple(self, structured_output: StructuredOutput) -> CompiledGrammar:
        return self._compile(Trial(write_structure(structured_output, self._find_vocabulary())))

    def _compile(self, trial: Trial) -> CompiledGrammar:
        with self._lock:
            if self._held_bytes() + trial.num_bytes > MAX_HELD_BYTES:
                self._shrink(0)
            if self._held_bytes() + trial.num_bytes > MAX_HELD_BYTES:
                raise SandboxBusyError(OUT_OF_MEMORY)
        matcher, mask = compile_text(self._find_vocabulary(), trial.text)
        compiled = CompiledGrammar(
            matcher, mask, self._slow_pool, is_slow=trial.is_slow, num_bytes=trial.num_bytes
        )
        self._active.add(compiled)
        return compiled

    def _held_bytes(self) -> int:
        return sum(grammar.num_bytes for grammar in list(self._active))


def _refuse(reason: str) -> Future[CompiledGrammar]:
    """A refusal that is not kept: what is refused may be megabytes."""
    refusal: Future[CompiledGrammar] = Future()
    refusal.set_exception(GrammarError(reason))
    return refusal
