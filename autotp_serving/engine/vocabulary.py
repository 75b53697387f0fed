"""A tokenizer's tokens in llguidance's form. Rank 0 and its helper processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.engine.tool_grammar import LLAMA_TAG

MARK = "\x02"
"""A character that begins no token with what follows it, and after which no blank is put."""

MAX_MATCH_LEN = 64
"""Bytes of the longest tokens that a text is matched with where the tokenizer is of no help."""


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
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = min(eos_token_ids)
        self._encode = encode
        no_text = {*special_token_ids, *eos_token_ids}
        self._ids = {text: token for token, text in enumerate(tokens) if token not in no_text}
        self._longest = min(MAX_MATCH_LEN, max(map(len, tokens)))
        self._lock = threading.Lock()
        self._loaded: Any = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer."""
        encode = partial(tokenizer.encode, add_special_tokens=False)
        return cls(**list_vocabulary(tokenizer), encode=encode)

    @property
    def has_llama_tag(self) -> bool:
        """True if Llama 3's special token for calls is there."""
        return LLAMA_TAG.encode() in (self.tokens[token] for token in self.special_token_ids)

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are exactly those of a text that stands inside another.

        The tokenizer itself may put a blank before the text, or write it in other characters.
        """
        data = text.encode()
        for token_ids in self._encode_inside(text):
            known = all(token < len(self.tokens) for token in token_ids)
            if known and b"".join(self.tokens[token] for token in token_ids) == data:
                return token_ids
        return self._match_longest(data)

    def _encode_inside(self, text: str) -> Iterator[list[int]]:
        """What the tokenizer makes of a text: at the beginning of a line, and after a mark."""
        if self._encode is None:
            return
        yield self._encode(text)
        mark = self._encode(MARK)
        marked = self._encode(MARK + text)
        if marked[: len(mark)] == mark:
            yield marked[len(mark) :]

    def _match_longest(self, data: bytes) -> list[int]:
        """A text in the longest tokens that there are; bytes that no token has are left out."""
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


def list_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """A vocabulary's fields as plain values, for another process."""
    return {
        "tokens": [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)],
        "special_token_ids": sorted(tokenizer.special_token_ids),
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
    }
