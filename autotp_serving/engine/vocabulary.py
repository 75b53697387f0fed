"""A tokenizer's tokens in llguidance's form. Rank 0 and its helper processes."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.engine.tool_grammar import LLAMA_TAG


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


def list_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """A vocabulary's fields as plain values, for another process."""
    return {
        "tokens": [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)],
        "special_token_ids": sorted(tokenizer.special_token_ids),
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
    }
