"""Compiled grammars, and guides that follow one completion each, token by token. Rank 0 only."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from typing import Any

from autotp_serving.engine.shortest_first import ShortestFirst

SLOW_SECONDS = 0.001
"""A grammar that once took longer to tell the next tokens does so in a thread from then on."""

MAX_TOO_SLOW_SECONDS = 2.0
"""A completion ends whose next tokens take longer to tell."""

TOO_COMPLEX = (
    "the structured output became too complex to follow in this completion: make it simpler"
)
TOO_SLOW = "the structured output takes too long to follow in this completion: make it simpler"


class CompiledGrammar:
    """See Grammar.

    Args:
        matcher: at the beginning of a completion.
        first_mask: what may come there; to compute it, the slowest, in the engine's thread once
            for each completion would hold up all others.
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
        self._has_begun = False
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
        if self.error is not None or not self._has_begun:
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
        self._has_begun = True
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
