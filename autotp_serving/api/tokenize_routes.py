"""/tokenize and /detokenize: what the model makes of a text, without running it. Rank 0 only."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from autotp_serving.api.admission import Admission
from autotp_serving.api.logprobs import token_text
from autotp_serving.api.openai.chat_schemas import (
    ChatRequest,
    Messages,
    Tools,
    Variables,
    check_template_fields,
)
from autotp_serving.api.openai.completion_parser import NO_TOOLS, CompletionParsers
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
    add_generation_prompt: bool | None = Field(
        None, description="for messages: end with the completion's head; default: true"
    )
    continue_final_message: bool | None = Field(
        None, description="for messages: go on with the last one's text"
    )
    chat_template_kwargs: Variables | None = Field(
        None, description="for messages: variables of the model's chat template"
    )
    tools: Tools | None = Field(None, description="for messages: what may be called")
    return_token_strs: bool | None = Field(None, description="give each token's text too")

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", "send either prompt or messages")
        check_template_fields(
            self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs
        )
        return self

    def as_chat(self) -> ChatRequest:
        """The chat whose prompt is asked for."""
        return ChatRequest.model_construct(
            messages=self.messages,
            tools=self.tools,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeRequest(StrictModel):
    """Body of /detokenize."""

    model: Text | None = Field(None, description="a name from /v1/models; default: the first")
    tokens: list[int] = Field(fail_fast=True, description="token ids; special ones have no text")


def token_routes(admission: Admission, names: ModelNames, parsers: CompletionParsers) -> APIRouter:
    """Both routes."""
    routes = TokenRoutes(admission, names, parsers)
    router = APIRouter(tags=["tokens"], redirect_slashes=False)
    router.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    router.add_api_route("/detokenize", routes.detokenize, methods=["POST"])
    return router


class TokenRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        admission: tokenizes.
        names: of the model.
        parsers: know whether the model has learned of tools.
    """

    def __init__(self, admission: Admission, names: ModelNames, parsers: CompletionParsers) -> None:
        self._admission = admission
        self._names = names
        self._parsers = parsers

    async def tokenize(self, body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Tokens of a prompt or of a conversation."""
        admission = self._admission
        self._names.check(body.model)
        if body.prompt is not None:
            tokens = await admission.encode(
                body.prompt, add_special_tokens=body.add_special_tokens, is_listed=True
            )
        else:
            knows_tools = self._parsers.tool_format is not None
            messages, options = body.as_chat().for_template(knows_tools=knows_tools)
            if body.tools and not knows_tools:
                request.state.record.headers["X-Warning"] = NO_TOOLS
            options = self._parsers.reasoning_options.complete(options, None)
            tokens = await admission.encode_chat(messages, options, is_listed=True)
        reply = {"tokens": tokens, "count": len(tokens), "max_model_len": admission.max_model_len}
        if body.return_token_strs:
            reply["token_strs"] = [token_text(admission.tokenizer, token) for token in tokens]
        return reply

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        """Text of some tokens."""
        admission = self._admission
        self._names.check(body.model)
        if len(body.tokens) > admission.max_listed_tokens:
            limit = admission.max_listed_tokens
            raise RequestError("tokens", f"must be at most {limit}, not {len(body.tokens)}")
        admission.check_tokens(body.tokens, "tokens")
        return {"prompt": admission.tokenizer.decode(body.tokens)}
