"""Text to tokens and back, as the API and the engine need it. Rank 0 only, never torch.

The engine sees the `Tokenizer` protocol; tests put a byte tokenizer in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What the server asks of a tokenizer; all calls are thread-safe."""

    eos_token_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Tokenize with the model's own special tokens added (a leading BOS, where it has one)."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out; incomplete bytes appear as U+FFFD."""
        ...
