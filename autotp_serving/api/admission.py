"""From a checked body to a request that fits the model: tokenize, measure, name. Rank 0 only."""

from __future__ import annotations

import asyncio

from autotp_serving.api.errors import ApiError
from autotp_serving.api.guard import RequestRecord
from autotp_serving.request import Request, SamplingParams
from autotp_serving.tokenizer import Tokenizer

MAX_INLINE_CHARS = 4096


class Admission:
    """Turns prompts into engine requests; refuses those that can never be served."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len

    async def encode(self, text: str) -> list[int]:
        """Tokenize without holding up the event loop."""
        if len(text) <= MAX_INLINE_CHARS:  # about a millisecond: cheaper than changing threads
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def admit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        record: RequestRecord,
        *,
        choice: int = 0,
        length_field: str,
    ) -> Request:
        """Make the engine's request. `length_field` is the client's word for max_tokens.

        Raises:
            ApiError: 400 when prompt and answer together exceed the model's length.
            RequestError: when the prompt has no tokens.
        """
        num_prompt_tokens = len(prompt_token_ids)
        total = num_prompt_tokens + params.max_tokens
        if total > self.max_model_len:
            raise ApiError(
                400,
                f"prompt: {num_prompt_tokens} tokens and {length_field} {params.max_tokens} make "
                f"{total}, over the limit of {self.max_model_len} (--max-model-len)",
                param="prompt" if num_prompt_tokens >= self.max_model_len else length_field,
                code="context_length_exceeded",
            )
        return Request(
            request_id=f"{record.request_id}-{choice}",
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            arrival_time=record.arrival_time,
        )
