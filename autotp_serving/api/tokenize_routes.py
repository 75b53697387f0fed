"""/tokenize and /detokenize: what the model makes of a text, without running it. Rank 0 only."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import Field, model_validator

from autotp_serving.api.admission import Admission
from autotp_serving.api.openai.chat_schemas import Messages
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.schemas import StrictModel, Text
from autotp_serving.request import RequestError


class TokenizeRequest(StrictModel):
    """Body of /tokenize: a prompt or a conversation."""

    model: Text | None = Field(None, description="a name from /v1/models; default: the first")
    prompt: Text | None = Field(None, description="text to tokenize")
    messages: Messages | None = Field(
        None, description="conversation to tokenize by the chat template"
    )
    add_special_tokens: bool = Field(True, description="for a prompt: begin with the model's BOS")
    add_generation_prompt: bool = Field(
        True, description="for messages: end with the completion's head"
    )

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", "send either prompt or messages")
        return self


class DetokenizeRequest(StrictModel):
    """Body of /detokenize."""

    model: Text | None = Field(None, description="a name from /v1/models; default: the first")
    tokens: list[int] = Field(fail_fast=True, description="token ids; special ones have no text")


def token_routes(admission: Admission, names: ModelNames) -> APIRouter:
    """Both routes."""
    routes = TokenRoutes(admission, names)
    router = APIRouter(tags=["tokens"], redirect_slashes=False)
    router.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    router.add_api_route("/detokenize", routes.detokenize, methods=["POST"])
    return router


class TokenRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        admission: tokenizes.
        names: of the model.
    """

    def __init__(self, admission: Admission, names: ModelNames) -> None:
        self._admission = admission
        self._names = names

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Tokens of a prompt or of a conversation."""
        admission = self._admission
        self._names.check(body.model)
        if body.prompt is not None:
            tokens = await admission.encode(
                body.prompt, add_special_tokens=body.add_special_tokens, is_listed=True
            )
        else:
            tokens = await admission.encode_chat(
                [message.for_template() for message in body.messages or ()],
                {"add_generation_prompt": body.add_generation_prompt},
                is_listed=True,
            )
        return {"tokens": tokens, "count": len(tokens), "max_model_len": admission.max_model_len}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        """Text of some tokens."""
        admission = self._admission
        self._names.check(body.model)
        if len(body.tokens) > admission.max_listed_tokens:
            limit = admission.max_listed_tokens
            raise RequestError("tokens", f"must be at most {limit}, not {len(body.tokens)}")
        admission.check_tokens(body.tokens, "tokens")
        return {"prompt": admission.tokenizer.decode(body.tokens)}
