"""Request bodies of the native routes, checked at the door. Rank 0 only.

Strict and closed: a wrong type or an unknown field is an error, so a typo never goes unnoticed.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from autotp_serving.api.errors import LONE_SURROGATE
from autotp_serving.request import SamplingParams

MAX_STOP_STRINGS = 64


def check_unicode(text: str) -> str:
    """Refuse text that no encoding can carry."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(LONE_SURROGATE) from error
    return text


# Every string of a body: pydantic alone lets lone surrogates through in some places.
Text = Annotated[str, AfterValidator(check_unicode)]


NonEmptyText = Annotated[str, Field(min_length=1), AfterValidator(check_unicode)]
Stop = NonEmptyText | Annotated[list[NonEmptyText], Field(max_length=MAX_STOP_STRINGS)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class StrictModel(BaseModel):
    """A body that refuses unknown fields and converts no types."""

    model_config = ConfigDict(strict=True, extra="forbid")


def as_tuple(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as the engine wants them."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


class GenerateRequest(StrictModel):
    """Body of /generate/ and /generate_stream/. The prompt goes to the model as it is."""

    prompt: NonEmptyText = Field(description="text to continue", examples=["What is AI?"])
    n_predict: int = Field(32, ge=1, description="most tokens to generate")
    temperature: float = Field(0.0, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="keep the likeliest tokens of this share")
    top_k: int = Field(0, ge=0, description="keep this many likeliest tokens; 0 keeps all")
    seed: Seed | None = Field(None, description="same seed and prompt, same text")
    stop: Stop | None = Field(None, description="text at which to end; not returned")
    ignore_eos: bool = Field(False, description="go on past the model's end token")

    def sampling_params(self) -> SamplingParams:
        """The same in the engine's words. Raises RequestError naming a field out of range."""
        return SamplingParams(
            max_tokens=self.n_predict,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=as_tuple(self.stop),
            ignore_eos=self.ignore_eos,
        )


class Message(StrictModel):
    """One piece of the answer."""

    role: str = "assistant"
    content: str | None


class GenerateReply(StrictModel):
    """Reply of /generate/, and each line of /generate_stream/."""

    index: int
    message: Message
    finish_reason: str | None


class ErrorDetail(StrictModel):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(StrictModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
