"""/v1/messages and /v1/messages/count_tokens, as Anthropic's clients know them. Rank 0 only."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving.api.anthropic.chat_fields import (
    FIELDS,
    list_all_ignored,
    to_chat,
)
from autotp_serving.api.anthropic.error_shape import AnthropicErrorReply
from autotp_serving.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from autotp_serving.api.anthropic.writer import MessageWriter
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.field_names import naming_fields
from autotp_serving.api.ignored_fields import ignored_header
from autotp_serving.api.openai.chat_admission import ChatAdmission
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.openai.reasoning_options import ReasoningOptions
from autotp_serving.api.reply import WHOLE_OR_EVENTS, answer


def anthropic_routes(
    engine: EngineClient, chats: ChatAdmission, names: ModelNames, reasoning: ReasoningOptions
) -> APIRouter:
    """Both routes."""
    routes = AnthropicRoutes(engine, chats, names, reasoning)
    router = APIRouter(
        prefix="/v1/messages",
        tags=["anthropic"],
        redirect_slashes=False,
        responses={"4XX": {"model": AnthropicErrorReply}, "5XX": {"model": AnthropicErrorReply}},
    )
    router.add_api_route(
        "",
        routes.messages,
        methods=["POST"],
        response_class=Response,
        responses=WHOLE_OR_EVENTS,
    )
    router.add_api_route("/count_tokens", routes.count_tokens, methods=["POST"])
    return router


class AnthropicRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        engine: runs what was admitted.
        chats: makes requests of conversations.
        names: of the model.
        reasoning: what the chat template can be told about it.
    """

    def __init__(
        self,
        engine: EngineClient,
        chats: ChatAdmission,
        names: ModelNames,
        reasoning: ReasoningOptions,
    ) -> None:
        self._engine = engine
        self._chats = chats
        self._names = names
        self._reasoning = reasoning

    async def messages(self, body: MessagesRequest, request: Request) -> Response:
        """Answer the last message of a conversation, in blocks."""
        record = request.state.record
        with naming_fields(FIELDS):
            chat = ChatRequest.model_validate(to_chat(body, self._reasoning))
            head = self._names.head(chat, record, "msg_")
            admitted = await self._chats.admit(chat, record, cuts_length=True)
        writer = MessageWriter(
            head,
            record.usage,
            admitted.parsers[0],
            is_cut=admitted.requests[0].params.max_tokens < body.max_tokens,
        )
        return await answer(
            self._engine,
            request,
            admitted.requests,
            writer,
            streams=bool(body.stream),
            headers=ignored_header(list_all_ignored(body, self._reasoning)),
        )

    async def count_tokens(self, body: CountTokensRequest, request: Request) -> Response:
        """Count the tokens of a conversation."""
        self._names.check(body.model)
        with naming_fields(FIELDS):
            chat = ChatRequest.model_validate(to_chat(body, self._reasoning))
            token_ids = await self._chats.encode(chat, request.state.record, is_listed=True)
        headers = ignored_header(list_all_ignored(body, self._reasoning))
        return JSONResponse({"input_tokens": len(token_ids)}, headers=headers)
