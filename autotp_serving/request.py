"""What a client asked for, validated, and what it gets back. Rank 0 only, standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestError(ValueError):
    """A request that cannot be served as asked; `field` names the culprit in the client's words."""

    def __init__(self, field_name: str, message: str) -> None:
        super().__init__(message)
        self.field_name = field_name


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Values are checked at birth, never again later.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep the k likeliest tokens; 0 keeps all.
        seed: same seed and prompt, same text, whatever else runs; None draws a fresh one.
        stop: strings that end the text; the match itself is not returned.
        stop_token_ids: token ids that end the text, beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens, up to `max_tokens`.

    Raises:
        RequestError: naming the field that is out of range.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError("max_tokens", f"must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise RequestError("temperature", f"must be from 0 to 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError("top_p", f"must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise RequestError("top_k", f"must be 0 (off) or more, not {self.top_k}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise RequestError("seed", f"must fit in 64 bits, not {self.seed}")
        if any(not text for text in self.stop):
            raise RequestError("stop", "a stop string must not be empty")

    @property
    def is_greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One prompt on its way through the engine, already tokenized and known to fit.

    Attributes:
        request_id: unique among requests alive in this process.
        prompt_token_ids: at least one token.
        params: how to sample.
        arrival_time: `time.monotonic()` seconds at which the server received it.
        tenant: whose request it is; those who share a server get turns. "" where all are one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    tenant: str = ""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise RequestError("prompt", "must not be empty")


@dataclass(frozen=True)
class RequestOutput:
    """What one step added to one request; the last one carries `finish_reason`.

    Attributes:
        text: new text, never a broken character, possibly empty while bytes are held back.
        token_ids: the tokens this step added, the end token included.
        finish_reason: None until the last output.
        error: one sentence, with `finish_reason` "error" only.
        error_code: a word for programs, beside `error`.
        num_output_tokens: tokens generated so far.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        queue_seconds: from arrival to the first step.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_code: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = field(default=0)
    queue_seconds: float = 0.0
