"""Logprobs in the shapes of OpenAI's two routes and of the native ones. Rank 0 only."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

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


class PromptLogprobs:
    """One object a prompt token, by token id: the shape of vLLM's `prompt_logprobs`.

    Args:
        tokenizer: knows the tokens' texts.
        num_top: most likely tokens to list beside each.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top

    def write(self, items: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """Null for the first token, which nothing comes before, then one object for each.

        The rank of a token beyond those that are listed is null.
        """
        written: list[dict[str, Any] | None] = [None]
        for item in items:
            ranks = {token: rank for rank, (token, _) in enumerate(item.top, 1)}
            entries = {item.token_id: item.logprob} | dict(item.top[: self._num_top])
            written.append(
                {
                    str(token): {
                        "logprob": max(logprob, LEAST),
                        "rank": ranks.get(token),
                        "decoded_token": token_text(self._tokenizer, token),
                    }
                    for token, logprob in entries.items()
                }
            )
        return written


class EchoedPrompt(NamedTuple):
    """A prompt that is put before its completion: the text, its first token, the others' logprobs.

    All of its tokens have room in the text but a first one that the tokenizer added.
    """

    text: str
    first_token: int
    logprobs: Sequence[TokenLogprobs]


class CompletionLogprobs:
    """The shape of /v1/completions, for one completion, in one piece or several.

    Args:
        tokenizer: knows the tokens' bytes.
        skip_special_tokens: special tokens take no room in the completion's text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(
        self, items: Sequence[TokenLogprobs], num_top: int, prompt: EchoedPrompt | None = None
    ) -> dict[str, Any]:
        """The object beside a text.

        Args:
            items: of the completion.
            num_top: most likely tokens to list beside each.
            prompt: comes before them, with the first piece.
        """
        shape: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        if prompt is not None:
            first = prompt.first_token
            is_added = not prompt.text.startswith(token_text(self._tokenizer, first))
            self._add(shape, first, None, None, self._skipped if is_added else ())
            for item in prompt.logprobs:
                self._add(shape, item.token_id, item.logprob, item.top[:num_top], ())
        for item in items:
            self._add(shape, item.token_id, item.logprob, item.top[:num_top], self._skipped)
        return shape

    def _add(
        self,
        shape: dict[str, Any],
        token_id: int,
        logprob: float | None,
        listed: Sequence[tuple[int, float]] | None,
        skipped: Collection[int],
    ) -> None:
        top: dict[str, float] | None = None
        if logprob is not None:
            # Several tokens may look alike, as pieces of characters do: the most likely stays.
            top = {}
            for token, one in (*(listed or ()), (token_id, logprob)):
                text = token_text(self._tokenizer, token)
                top[text] = max(one, LEAST, top.get(text, LEAST))
        shape["tokens"].append(token_text(self._tokenizer, token_id))
        shape["token_logprobs"].append(logprob if logprob is None else max(logprob, LEAST))
        shape["top_logprobs"].append(top)
        shape["text_offset"].append(self._offset)
        if token_id not in skipped:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
