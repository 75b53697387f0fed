"""Compiled grammars, and guides that follow one completion each, token by token. Rank 0 only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from autotp_serving.engine.shortest_first import ShortestFirst

SLOW_SECONDS = 0.001
"""A grammar that once took longer to tell the next tokens does so in a thread from then on."""

MAX_TOO_SLOW_SECONDS = 2.0
"""A completion ends whose next tokens take longer to tell."""

MAX_AHEAD = 16
"""Tokens that must come and are found along with the next, where telling takes long."""

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
        return MatcherGuide(self, self.copy_matcher())

    def copy_matcher(self) -> Any:
        """One at the beginning of a completion."""
        return self._matcher.deep_copy()


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
        self._here: bytes | None = None  # the mask, once it is computed
        self._ahead: list[tuple[int, bytes]] = []  # tokens that may follow, the mask behind each
        self._accepted: list[int] = []
        self._can_look_ahead = True
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

    def allowed(self, num_ahead: int = 0) -> bytes:
        """See Guide. A matcher that gave up allows the end tokens, and `accept` tells."""
        if num_ahead:
            return self._ahead[num_ahead - 1][1]
        if self.error is not None or not self._accepted:
            return self._grammar.first_mask
        if self._mask is not None:
            return self._mask.result()
        if self._here is None:
            self._here = self._compute_in_time()
        return self._here

    def look_ahead(self, guesses: Sequence[int], limit: int) -> list[int]:
        """See Guide. What a look into what may never come costs or breaks is not held against the
        completion: it only looks ahead no more. A slow one has looked when it told the next tokens,
        and at no guesses.
        """
        if self.error is not None or not self._can_look_ahead:
            return []
        if self._mask is None and not self._grammar.is_slow:
            self._look(self.allowed(), guesses, limit, self._compute_in_time)
        return [token for token, _ in self._ahead[:limit]]

    def _look(
        self, mask: bytes, guesses: Sequence[int], limit: int, compute: Callable[[], bytes]
    ) -> None:
        """Find up to so many tokens that may follow, and the masks behind them.

        Args:
            mask: of the next token.
            compute: tells further ones.
        """
        known, self._ahead = self._ahead, []
        if self._matcher.is_error():
            return
        left = deque(guesses)
        was_slow = self._grammar.is_slow
        num_consumed = 0
        while len(self._ahead) < limit and self._grammar.is_slow == was_slow:
            token = find_only_token(mask)
            if token is None:
                if not left or not allows(mask, left[0]):
                    break
                token = left.popleft()
            elif left and left.popleft() != token:
                left.clear()
            num_consumed += 1
            if not self._matcher.consume_token(token) or self._matcher.is_stopped():
                break
            if known and known[0][0] == token:
                mask = known.pop(0)[1]
            else:
                known.clear()
                mask = compute()
            self._ahead.append((token, mask))
        if num_consumed and (self._matcher.is_error() or not self._matcher.rollback(num_consumed)):
            self._give_up_looking()

    def _give_up_looking(self) -> None:
        """Go back to what was accepted, by the way that it came."""
        self._can_look_ahead, self._ahead = False, []
        self._matcher = self._grammar.copy_matcher()
        self._matcher.consume_tokens(self._accepted)

    def accept(self, token_id: int) -> bool:
        """See Guide."""
        self._accepted.append(token_id)
        self._mask = self._here = self._started = None
        if self._ahead and self._ahead[0][0] == token_id:
            self._here = self._ahead.pop(0)[1]
        else:
            self._ahead.clear()
        if self.error is not None:
            return True
        if self._matcher.is_error() or not self._matcher.consume_token(token_id):
            self.error = TOO_COMPLEX
        is_complete: bool = self._matcher.is_stopped()
        is_over = is_complete or self.error is not None
        if self._grammar.is_slow and self._here is None and not is_over:
            self._mask = self._grammar.slow_pool.submit(0, self._compute_elsewhere)
        return is_complete

    def _compute_in_time(self) -> bytes:
        """The next tokens; where that took long, others are computed elsewhere from then on."""
        started = time.thread_time()
        mask = self._compute()
        if time.thread_time() - started > SLOW_SECONDS:
            self._grammar.is_slow = True
        return mask

    def _compute_elsewhere(self) -> bytes:
        """The next tokens, in another thread, and behind them those that must come."""
        mask = self._compute()
        if self._can_look_ahead:
            self._look(mask, (), MAX_AHEAD, self._compute)
        return mask

    def _compute(self) -> bytes:
        """The next tokens, in this thread."""
        self._started = time.monotonic()
        mask: bytes = self._matcher.compute_bitmask()
        return mask


def find_only_token(mask: bytes) -> int | None:
    """The token that must come, where a mask allows but one."""
    bits = int.from_bytes(mask, "little")
    return bits.bit_length() - 1 if bits.bit_count() == 1 else None


def allows(mask: bytes, token_id: int) -> bool:
    """Whether a mask has a token's bit; the model may have more tokens than the tokenizer."""
    return token_id // 8 < len(mask) and mask[token_id // 8] >> token_id % 8 & 1 == 1
