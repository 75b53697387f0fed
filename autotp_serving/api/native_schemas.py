"""Bodies of the native routes. Rank 0 only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from autotp_serving.api.sampling_fields import SamplingFields
from autotp_serving.api.schemas import (
    PRIORITY,
    NonEmptyText,
    Priority,
    Seed,
    Stop,
    StrictModel,
    as_tuple,
    only,
)
from autotp_serving.request import MAX_LOGPROBS, SamplingParams
from autotp_serving.structured_output import StructuredOutput


class GenerateRequest(SamplingFields):
    """Body of /generate/ and /generate_stream/. The prompt goes to the model as it is."""

    prompt: NonEmptyText = Field(description="text to continue", examples=["What is AI?"])
    n_predict: int = Field(32, ge=1, description="most tokens to generate")
    temperature: float = Field(0.0, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="keep the most likely tokens of this share"
    )
    top_k: int = Field(0, ge=0, description="keep this many most likely tokens; 0 keeps all")
    seed: Seed | None = Field(None, description="same seed and prompt, same text")
    stop: Stop | None = Field(None, description="text at which to end; not returned")
    ignore_eos: bool = Field(False, description="go on past the model's end token")
    priority: Priority | None = Field(None, description=PRIORITY)
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="give each token's logprob and list so many most likely tokens beside it; "
        "default: no logprobs",
    )
    echo: bool = Field(False, description="put the prompt before the completion, and its logprobs")
    n: Annotated[Any, only(1)] = Field(
        None, description="a reply holds one completion: use /v1/completions"
    )
    best_of: Annotated[Any, only(1)] = Field(
        None, description="a reply holds one completion: use /v1/completions"
    )
    use_beam_search: Annotated[Any, only(False)] = None

    def sampling_params(self, structured_output: StructuredOutput | None) -> SamplingParams:
        """The same in the engine's words. Raises RequestError naming a field out of range."""
        return SamplingParams(
            **self.shared_params(self.n_predict, structured_output),
            max_tokens=self.n_predict,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=as_tuple(self.stop),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class Message(StrictModel):
    """One piece of the completion."""

    role: str = "assistant"
    content: str | None


class Logprob(StrictModel):
    """How likely a token was; its logprob is null where nothing comes before it."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(Logprob):
    """The same, and the most likely tokens in its place."""

    top_logprobs: list[Logprob]


class GenerateReply(StrictModel):
    """Reply of /generate/, and each line of /generate_stream/."""

    index: int
    message: Message
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None = Field(None, description="only where asked for")
