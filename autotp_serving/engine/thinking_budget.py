"""Ends a model's reasoning after so many tokens. Rank 0 only, engine thread.

Once the budget is spent the end of the reasoning is forced, token by token; before and after that a
completion is as free as it would be otherwise, or follows its structured output.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.structured_output import Grammar, Guide, ReasoningFormat

MAX_TAIL_LEN = 64
"""Bytes of the latest text, more than any tag has."""

CHANNEL = b"<|channel|>"
OTHER_CHANNELS = ("final", "commentary")


class BudgetTags:
    """How a model's reasoning begins and ends, in its tokens.

    Attributes:
        open: bytes before the reasoning.
        close: bytes after it.
        next_ids: tokens with which another channel begins; none where there are no channels.

    Args:
        tokenizer: of the model.
        reasoning_format: how it marks its reasoning.
    """

    def __init__(self, tokenizer: Tokenizer, reasoning_format: ReasoningFormat) -> None:
        syntax = REASONING_SYNTAXES[reasoning_format]
        self.open, self.close = syntax.open.encode(), syntax.close.encode()
        self.token_bytes = tokenizer.token_bytes
        self._tokenizer = tokenizer
        channels = OTHER_CHANNELS if syntax.answer else ()
        self.next_ids = [self._encode(one)[0] for one in channels]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def end_after(self, tail: bytes) -> list[int]:
        """Tokens that end the reasoning, of whose end tag a text may have a part already."""
        for length in range(min(len(self.close) - 1, len(tail)), 0, -1):
            if tail.endswith(self.close[:length]):
                rest = self.close[length:]
                token_ids = self._encode(rest.decode())
                # Some tokenizers put a blank before it, which is no part of the tag.
                if b"".join(map(self.token_bytes, token_ids)) == rest:
                    return token_ids
        return self._encode(self.close.decode())

    def mask(self, token_ids: list[int]) -> bytes:
        """These tokens as packed bits, see Guide."""
        bits = bytearray((self._tokenizer.vocab_size + 31) // 32 * 4)
        for token in token_ids:
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)


@dataclass(frozen=True)
class ThinkingBudget:
    """See Grammar.

    Attributes:
        num_tokens: most tokens of reasoning, the tags around it not counted.
        tags: of the model.
        has_begun: the prompt ends inside the reasoning.
        inner: what the completion follows beside; None where it is free.
    """

    num_tokens: int
    tags: BudgetTags
    has_begun: bool
    inner: Grammar | None = None

    def start(self) -> BudgetGuide:
        """See Grammar."""
        return BudgetGuide(self, None if self.inner is None else self.inner.start())


class BudgetGuide:
    """See Guide. Free steps have no mask.

    Args:
        budget: what is kept to.
        inner: follows the completion through its structured output.
    """

    def __init__(self, budget: ThinkingBudget, inner: Guide | None) -> None:
        self._budget = budget
        self._tags = budget.tags
        self._inner = inner
        self._tail = b""
        self._num_tokens = 0
        self._forced: list[int] = []
        self._state: Literal["before", "inside", "after"] = "before"
        if budget.has_begun:
            self._state = "inside"
            self._check_budget()

    @property
    def error(self) -> str | None:
        """See Guide."""
        return None if self._inner is None else self._inner.error

    @property
    def is_ready(self) -> bool:
        """See Guide."""
        return bool(self._forced) or self._inner is None or self._inner.is_ready

    def wait(self, seconds: float) -> None:
        """See Guide."""
        if self._inner is not None:
            self._inner.wait(seconds)

    def allowed(self, num_ahead: int = 0) -> bytes | None:
        """See Guide; None where any token may come."""
        own = None if num_ahead else self._own_mask()
        if own is not None or self._inner is None:
            return own
        return self._inner.allowed(num_ahead)

    def look_ahead(self, guesses: Sequence[int], limit: int) -> list[int]:
        """See Guide; as far as the budget has no say, which is in no mask that is kept."""
        if self._own_mask() is not None:
            return []
        tokens = list(guesses[:limit])
        if self._inner is not None:
            tokens = self._inner.look_ahead(guesses, limit)
        ahead = copy.copy(self)  # without its inner guide, which is not asked
        for number, token in enumerate(tokens):
            ahead._read(token)
            if ahead._own_mask() is not None:
                return tokens[:number]
        return tokens

    def _own_mask(self) -> bytes | None:
        """What the budget has to say of the next token."""
        if self._forced:
            return self._tags.mask(self._forced[:1])
        is_spent = self._num_tokens >= self._budget.num_tokens
        is_free = self._inner is None and is_spent and self._tags.next_ids
        if is_free and self._tail.endswith(CHANNEL):
            return self._tags.mask(self._tags.next_ids)
        return None

    def accept(self, token_id: int) -> bool:
        """See Guide."""
        self._read(token_id)
        return self._inner is not None and self._inner.accept(token_id)

    def _read(self, token_id: int) -> None:
        """Find the reasoning's beginning and end."""
        tags = self._tags
        self._tail += tags.token_bytes(token_id)
        if self._forced:
            self._forced.pop(0)
            if not self._forced:
                self._state, self._tail = "after", b""
        elif self._state == "inside":
            if tags.close in self._tail:
                self._state, self._tail = "after", b""
                return
            self._num_tokens += 1
            self._check_budget()
        elif self._state == "before" or tags.next_ids:
            begun = self._tail if tags.next_ids else self._tail.lstrip()
            if tags.open in begun if tags.next_ids else begun.startswith(tags.open):
                self._state, self._tail = "inside", b""
                self._check_budget()
            elif not tags.next_ids and not tags.open.startswith(begun):
                self._state = "after"
        self._tail = self._tail[-MAX_TAIL_LEN:]

    def _check_budget(self) -> None:
        if self._num_tokens >= self._budget.num_tokens:
            self._forced = self._tags.end_after(self._tail)
