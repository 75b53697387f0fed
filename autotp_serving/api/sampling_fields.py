"""Sampling fields that all routes share, and how they reach the engine. Rank 0 only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from autotp_serving.api.schemas import MAX_STOP_STRINGS, at_most
from autotp_serving.api.structured_output import StructuredOutputFields
from autotp_serving.request import RequestError
from autotp_serving.structured_output import StructuredOutput

MAX_BIASED_TOKENS = 1024


def _check_bias(bias: dict[str, float]) -> dict[str, float]:
    """JSON's keys are text: these must be numbers of tokens, each token once."""
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise ValueError(f"'{token[:20]}' is not the number of a token")
    if len({int(token) for token in bias}) < len(bias):
        raise ValueError("names a token twice")
    return bias


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]],
    Field(max_length=MAX_BIASED_TOKENS),
    at_most(MAX_BIASED_TOKENS),
    AfterValidator(_check_bias),
]


class SamplingFields(StructuredOutputFields):
    """Null means the default."""

    min_p: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="keep tokens at least this times as likely as the most likely; default 0, in "
        "/v1 the model's",
    )
    min_tokens: int | None = Field(
        None, ge=0, description="tokens to generate before the text may end; default 0"
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2.0,
        le=2.0,
        description="taken off a token's logit for each time it was generated; default 0",
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2.0,
        le=2.0,
        description="taken off the logits of tokens that were generated; default 0",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=100.0,
        description="divides the logits of tokens in prompt and completion; default 1, in /v1 "
        "the model's",
    )
    logit_bias: LogitBias | None = Field(None, description="added to logits, by token id")
    stop_token_ids: list[int] | None = Field(
        None, max_length=MAX_STOP_STRINGS, description="tokens at which to end"
    )
    skip_special_tokens: bool | None = Field(
        None, description="leave special tokens out of the text; default true"
    )

    def shared_params(
        self, max_tokens: int, structured_output: StructuredOutput | None
    ) -> dict[str, Any]:
        """These fields in the words of SamplingParams. Raises RequestError naming one of them.

        Args:
            max_tokens: most tokens to generate.
            structured_output: what the completion must keep to; None if it is free.
        """
        if self.min_tokens and self.min_tokens > max_tokens:
            raise RequestError("min_tokens", f"is over the {max_tokens} tokens to generate at most")
        names = SamplingFields.model_fields.keys() - StructuredOutputFields.model_fields.keys()
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given["structured_output"] = structured_output
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return {name: value for name, value in given.items() if value is not None}
