"""Logprobs in the shapes of OpenAI's two routes and of the native ones. Rank 0 only."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import TokenLogprobs

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's choice too."""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself; a piece of a character becomes U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


class ListedLogprobs:
    """One object a token: the shape of /v1/chat/completions and of the native routes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, items: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """One object for each token."""
        content = []
        for item in items:
            top = [self._entry(token, logprob) for token, logprob in item.top]
            content.append(self._entry(item.token_id, item.logprob) | {"top_logprobs": top})
        return content

    def write_first(self, token_id: int) -> dict[str, Any]:
        """The object of a prompt's first token, which nothing comes before."""
        return self._entry(token_id, None) | {"top_logprobs": []}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_text(self._tokenizer, token_id),
            "logprob": logprob if logprob is None else max(logprob, LEAST),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class CompletionLogprobs:
    """The shape of /v1/completions, for one completion, in one piece or several.

    Args:
        tokenizer: knows the tokens' bytes.
        skip_special_tokens: special tokens take no room in the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(
        self, items: Sequence[TokenLogprobs], first_token: int | None = None
    ) -> dict[str, Any]:
        """The object beside a text.

        Args:
            first_token: of the prompt, which nothing comes before; with an echo's first piece.
        """
        shape: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        if first_token is not None:
            self._add(shape, first_token, None, None)
        for item in items:
            # Several tokens may look alike, as pieces of characters do: the most likely stays.
            top: dict[str, float] = {}
            for token, logprob in (*item.top, (item.token_id, item.logprob)):
                text = token_text(self._tokenizer, token)
                top[text] = max(logprob, LEAST, top.get(text, LEAST))
            self._add(shape, item.token_id, max(item.logprob, LEAST), top)
        return shape

    def _add(
        self,
        shape: dict[str, Any],
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        shape["tokens"].append(token_text(self._tokenizer, token_id))
        shape["token_logprobs"].append(logprob)
        shape["top_logprobs"].append(top)
        shape["text_offset"].append(self._offset)
        if not (self._skip_special_tokens and token_id in self._tokenizer.special_token_ids):
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
