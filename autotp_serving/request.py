"""What a client asked for, validated, and what it gets back. Rank 0 only, standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal

from autotp_serving.structured_output import Grammar, StructuredOutput

FinishReason = Literal["stop", "length", "abort", "error"]
PoolingMethod = Literal["last", "mean", "cls"]

MAX_LOGPROBS = 20
"""Most alternatives that are listed beside a token."""

MAX_CANDIDATES = 64
"""Up to so large a top_k, a token is chosen from that many of the largest logits."""


class RequestError(ValueError):
    """A request that cannot be served as asked; `field` names the culprit in the client's words."""

    def __init__(self, field_name: str, message: str) -> None:
        super().__init__(message)
        self.field_name = field_name


class AdapterError(ValueError):
    """An adapter that cannot be loaded or unloaded; the message names it and the cause."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter that is loaded, or on its way.

    Attributes:
        name: by which requests ask for it.
        path: its folder.
        slot: where the ranks keep it, from 1 on.
        number: no other had it since the server started: what it made is never taken for another's.
    """

    name: str
    path: str
    slot: int
    number: int


def _check_type(field_name: str, value: Any, kind: type) -> None:
    """Refuse a value of another type; True and False are no numbers."""
    if not isinstance(value, kind) or isinstance(value, bool):
        words: dict[type, str] = {Integral: "a whole number", Real: "a number", str: "a text"}
        raise RequestError(field_name, f"must be {words[kind]}, not {value!r:.50}")


def check_tokens(field_name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse tokens that the tokenizer or the model does not have.

    Raises:
        RequestError: naming the field and the first of them.
    """
    token_ids = tuple(token_ids)
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(field_name, f"token {wrong} is not from 0 to {vocab_size - 1}")


@dataclass(frozen=True)
class Pooling:
    """What is made of a prompt's hidden states, where a prompt is not continued.

    Attributes:
        method: those of the last token, of the first (cls), or the mean of all.
        normalize: divide the vector by its length.
        dimensions: keep so many of its first numbers, before that; None keeps all.
        whole: the prompt runs in one step, as its tokens see those after them.
    """

    method: PoolingMethod = "last"
    normalize: bool = False
    dimensions: int | None = None
    whole: bool = False

    @property
    def can_reuse(self) -> bool:
        """True where keys and values of an equal beginning, from the prefix cache, will do."""
        return self.method == "last" and not self.whole


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Values are checked at birth, never again later.

    Logits are changed in vLLM's order (structured output, min_tokens, logit_bias, penalties), then
    comes transformers' (temperature, top_k, top_p, min_p). Logprobs are those of the model itself,
    before any of this.

    Attributes:
        max_tokens: most tokens to generate, at least 1; 0 only with `prompt_logprobs`, and with
            `pooling` always.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep the k most likely tokens; 0 keeps all.
        seed: same seed and prompt, same text, whatever else runs; None takes a fresh one.
        stop: strings that end the text; the match itself is not returned.
        stop_token_ids: token ids that end the text, beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens, up to `max_tokens`.
        min_p: keep tokens at least this times as likely as the most likely, from 0 (all) to 1.
        frequency_penalty: taken off a token's logit for each time it was generated, -2 to 2.
        presence_penalty: taken off the logit of each token that was generated, -2 to 2.
        repetition_penalty: divides the logits of tokens in prompt and completion (multiplies
            negative ones); above 0, 1 is off.
        logit_bias: added to the logits of these tokens, -100 to 100 each.
        min_tokens: tokens to generate before an end token or a stop string may end the text.
        logprobs: most likely tokens to list beside each token's logprob; None gives no logprobs.
        prompt_logprobs: the same for the prompt's tokens; runs the whole prompt.
        skip_special_tokens: leave special tokens out of the text.
        structured_output: what the completion must keep to; None if it is free.
        pooling: what to give in place of a completion; of models that embed or rerank.

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
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_output: StructuredOutput | None = None
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        self._check_types()
        is_read = self.prompt_logprobs is not None or self.pooling is not None
        if self.max_tokens < 0 or (self.max_tokens == 0 and not is_read):
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
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError("min_p", f"must be from 0 to 1, not {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise RequestError(name, f"must be from -2 to 2, not {getattr(self, name)}")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise RequestError(
                "repetition_penalty", f"must be from 0.01 to 100, not {self.repetition_penalty}"
            )
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise RequestError("logit_bias", f"token {token} must not be negative")
            if not -100.0 <= bias <= 100.0:
                raise RequestError("logit_bias", f"{bias} of token {token} is not in -100 to 100")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError("min_tokens", f"must be from 0 to max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise RequestError(name, f"must be from 0 to {MAX_LOGPROBS}, not {value}")
        if self.pooling is not None and (self.max_tokens or self.prompt_logprobs is not None):
            raise RequestError("pooling", "gives no tokens and no logprobs: max_tokens must be 0")
        if self.structured_output is not None and self.min_tokens:
            raise RequestError(
                "min_tokens", "cannot be held where a structured output ends the text"
            )

    def _check_types(self) -> None:
        """Refuse what only looks like a number or a text, and keep copies that nobody changes."""
        kinds: dict[Any, type] = {"int": Integral, "int | None": Integral, "float": Real}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type == "bool" and not isinstance(value, bool):
                raise RequestError(one.name, "must be true or false")
            if one.type in kinds and not (value is None and one.default is None):
                _check_type(one.name, value, kinds[one.type])
        for name, kind in (("stop", str), ("stop_token_ids", Integral)):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list, set, frozenset)):
                raise RequestError(name, "must be a list")
            for value in values:
                _check_type(name, value, kind)
            object.__setattr__(self, name, tuple(values))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", "must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_type("logit_bias", token, Integral)
            _check_type("logit_bias", bias, Real)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.structured_output is not None and not isinstance(
            self.structured_output, StructuredOutput
        ):
            raise RequestError("structured_output", "must be a Structure")

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    @cached_property
    def has_penalties(self) -> bool:
        """True when the choice depends on which tokens came before."""
        added = (self.frequency_penalty, self.presence_penalty) != (0.0, 0.0)
        return added or self.repetition_penalty != 1.0

    @cached_property
    def is_plain(self) -> bool:
        """True when, structured output apart, the most likely token is all that is asked for."""
        return (
            self.is_greedy
            and self.logprobs is None
            and not (self.has_penalties or self.logit_bias or self.min_tokens)
        )

    @cached_property
    def num_top_logits(self) -> int:
        """Structured output apart, how many of the largest logits are enough to choose a token: 1
        for the most likely one, at least 2 for a draw from the top_k; 0 when all are needed.

        What top_p and min_p leave of a top_k depends on these alone; of the whole vocabulary it
        depends on the sum of all.
        """
        if self.is_plain:
            return 1
        changes = self.has_penalties or self.logit_bias or self.min_tokens
        if changes or self.logprobs is not None or self.is_greedy:
            return 0
        return max(2, self.top_k) if 0 < self.top_k <= MAX_CANDIDATES else 0


@dataclass(frozen=True)
class Request:
    """One prompt on its way through the engine, already tokenized and known to fit.

    Attributes:
        request_id: unique among requests active in this process.
        prompt_token_ids: at least one token.
        params: how to sample.
        arrival_time: `time.monotonic()` seconds at which the server received it.
        tenant: whose request it is; those who share a server get turns. "" where all are one.
        grammar: `params.structured_output`, compiled, and what else the tokens have to follow.
        priority: lower ones run earlier, where the server heeds it (--scheduling-policy).
        adapter: that it runs with; None for the model as it is.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    tenant: str = ""
    grammar: Grammar | None = None
    priority: int = 0
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt_token_ids, tuple) or not self.prompt_token_ids:
            raise RequestError("prompt", "must be a tuple of token ids, and not empty")
        if set(map(type, self.prompt_token_ids)) != {int}:
            for token in self.prompt_token_ids:
                _check_type("prompt", token, Integral)
            object.__setattr__(self, "prompt_token_ids", tuple(map(int, self.prompt_token_ids)))
        for name in ("request_id", "tenant"):
            _check_type(name, getattr(self, name), str)
        _check_type("arrival_time", self.arrival_time, Real)
        _check_type("priority", self.priority, Integral)
        if not isinstance(self.params, SamplingParams):
            raise RequestError("params", "must be SamplingParams")
        if self.grammar is None and self.params.structured_output is not None:
            raise RequestError("structured_output", "must be compiled before the request is made")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was, by the model's own distribution.

    Attributes:
        token_id: the token that came.
        logprob: its natural logarithm of probability.
        top: as many of the most likely tokens there as were asked for, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
        logprobs: one for each of `token_ids`, if asked for.
        prompt_logprobs: one for each prompt token after the first, if asked for; in the first
            output of the request and nowhere else.
        stop_string: the one that ended the text; None where something else did.
        pooled: what `Pooling` makes of the prompt, float32 numbers one after another; b"" for
            completions.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_code: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_string: str | None = None
    pooled: bytes = b""
