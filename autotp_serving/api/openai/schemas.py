"""Request bodies of the OpenAI routes: every field is honoured or refused by name. Rank 0 only.

A field typed with `only(...)` is known but not honoured: it may hold the values that ask for
nothing, and any other value is answered 400. Null always means the default.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from autotp_serving.api.ignored_fields import Ignored
from autotp_serving.api.openai.peer_fields import PeerFields
from autotp_serving.api.schemas import (
    NonEmptyText,
    Seed,
    Stop,
    StrictModel,
    Text,
    as_tuple,
    check_unicode,
    only,
)
from autotp_serving.engine.sampling_defaults import SamplingDefaults
from autotp_serving.request import MAX_LOGPROBS, RequestError, SamplingParams
from autotp_serving.structured_output import StructuredOutput

MAX_CHOICES = 128
MAX_PROMPTS = 2**14
LABEL = "for the caller's own books; asks nothing of the completion"
DEFAULT_COMPLETION_TOKENS = 16


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """All prompts of a completion: text, a list of texts, token ids, or a list of such lists."""
    if isinstance(value, str) or _is_list_of(int, value):
        value = [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts, not {len(value)}")
    if not _is_list_of(str, value) and not (
        _is_list_of(list, value) and all(_is_list_of(int, part) for part in value)
    ):
        raise ValueError("must be text, a list of texts, token ids, or a list of token id lists")
    if not all(value):
        raise ValueError("must not be empty")
    for prompt in value:
        if isinstance(prompt, str):
            check_unicode(prompt)
    prompts: list[str | list[int]] = value
    return prompts


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is kind for part in value)


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
# For the documentation; the parser alone decides, and says what it wants in one sentence.
PromptForms = (
    NonEmptyText
    | TokenIds
    | Annotated[list[NonEmptyText], Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1)]
)
Prompts = Annotated[
    list[str | list[int]], PlainValidator(_parse_prompts, json_schema_input_type=PromptForms)
]


class StreamOptions(StrictModel):
    """What a stream tells beside its text."""

    include_usage: bool | None = Field(None, description="end with a chunk that holds the usage")
    include_obfuscation: Annotated[Any, only(False)] = None
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: every chunk holds the usage so far"
    )


class SampledRequest(PeerFields):
    """How OpenAI's routes may be told to sample."""

    temperature: float | None = Field(
        None,
        ge=0.0,
        le=100.0,
        description="what logits are divided by; 0 is greedy; default: the model's, or 1",
    )
    top_p: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="keep the most likely tokens of this share; default: the model's, or 1",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="keep so many most likely tokens; 0 or -1: all; default: the model's, or 0",
    )
    seed: Seed | None = Field(None, description="same seed and prompt, same text")
    stop: Stop | None = Field(None, description="text at which to end; not returned")
    ignore_eos: bool | None = Field(None, description="go on past the model's end token")


class OpenAIRequest(SampledRequest):
    """What both OpenAI routes take."""

    model: Text | None = Field(
        None,
        description="a name from /v1/models, or any other with --any-model-name; "
        "default: the first",
    )
    n: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="completions per prompt; default 1"
    )
    stream: bool | None = Field(None, description="answer in server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens to generate; default 16 for completions, what fits for chat",
    )

    return_token_ids: bool | None = Field(
        None, description="give the token ids of prompt and completion"
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="list so many most likely tokens beside each of the prompt's, but the first; "
        "not with stream; default: no logprobs",
    )

    user: Ignored = Field(None, description=LABEL)

    @model_validator(mode="after")
    def _check_stream_options(self) -> OpenAIRequest:
        options = self.stream_options
        asks = options and (options.include_usage or options.continuous_usage_stats)
        if asks and not self.stream:
            raise RequestError("stream_options", "is only allowed with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs", "cannot be streamed")
        return self

    @property
    def num_choices(self) -> int:
        """Completions to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """True when a stream must end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def always_usage(self) -> bool:
        """True when every chunk of a stream must hold the usage so far."""
        options = self.stream_options
        return self.include_usage and bool(options and options.continuous_usage_stats)

    @property
    def num_sampled(self) -> int:
        """Completions to generate for each prompt, of which the best may be picked."""
        return self.num_choices

    def logprob_params(self) -> dict[str, Any]:
        """Which logprobs are needed, in the words of SamplingParams."""
        raise NotImplementedError

    def sampling_params(
        self,
        max_tokens: int,
        choice: int,
        structured_output: StructuredOutput | None,
        defaults: SamplingDefaults,
    ) -> SamplingParams:
        """The same in the engine's words, for one of the completions to a prompt.

        Args:
            defaults: of fields that the body leaves out.
        """
        shared = self.shared_params(max_tokens, structured_output)
        shared.setdefault("min_p", defaults.min_p)
        shared.setdefault("repetition_penalty", defaults.repetition_penalty)
        return SamplingParams(
            **shared,
            **self.logprob_params(),
            max_tokens=max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else max(0, self.top_k),
            # Each completion samples with its own numbers, the same ones at each call.
            seed=None if self.seed is None else self.seed + choice,
            stop=as_tuple(self.stop),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(OpenAIRequest):
    """Body of /v1/completions."""

    prompt: Prompts = Field(
        description="text, a list of texts, token ids, or a list of token id lists"
    )
    echo: bool | None = Field(None, description="put the prompt before the completion")
    max_tokens: int | None = Field(
        None, ge=0, description="most tokens to generate, 0 only with echo; default 16"
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="generate so many, return the n most likely per token; default n",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="list so many most likely tokens beside each; default: no logprobs",
    )
    suffix: Annotated[Any, only("")] = None
    add_special_tokens: Annotated[Any, only(True)] = None

    @model_validator(mode="after")
    def _check_fields_together(self) -> CompletionRequest:
        if self.num_sampled < self.num_choices:
            raise RequestError("best_of", f"must be at least n, which is {self.num_choices}")
        if self.num_sampled > self.num_choices and self.stream:
            raise RequestError("best_of", "over n cannot be streamed: the best is known at the end")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens", "0 is only allowed with echo")
        return self

    @property
    def num_sampled(self) -> int:
        return self.best_of or self.num_choices

    def logprob_params(self) -> dict[str, Any]:
        # To score a prompt is all that is left to do when no token is wanted.
        scored = self.logprobs or 0 if self.max_tokens == 0 else self.logprobs
        ranked = 0 if self.num_sampled > self.num_choices else None
        of_prompt = [scored if self.echo else None, self.prompt_logprobs]
        return {
            "logprobs": ranked if self.logprobs is None else self.logprobs,
            "prompt_logprobs": max((one for one in of_prompt if one is not None), default=None),
        }

    def max_new_tokens(self, num_tokens_left: int) -> int:
        """Most tokens to generate; `num_tokens_left` is what the model has left for them."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(1, min(num_tokens_left, DEFAULT_COMPLETION_TOKENS))
