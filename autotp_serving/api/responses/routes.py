"""POST /v1/responses, as OpenAI's newer clients and agents ask for it. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.field_names import naming_fields
from autotp_serving.api.ignored_fields import ignored_header, list_ignored
from autotp_serving.api.logprobs import ListedLogprobs
from autotp_serving.api.openai.chat_admission import ChatAdmission
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.openai.reasoning_options import ReasoningOptions
from autotp_serving.api.openai.schemas import SampledRequest
from autotp_serving.api.reply import WHOLE_OR_EVENTS, answer
from autotp_serving.api.responses.item_memory import ItemMemory
from autotp_serving.api.responses.items import input_items, to_messages
from autotp_serving.api.responses.schemas import LOGPROBS, InputItem, ResponsesRequest
from autotp_serving.api.responses.store import ResponseStore
from autotp_serving.api.responses.tools import ChatTools
from autotp_serving.api.responses.writer import ResponsesWriter
from autotp_serving.api.structured_output import ResponseFormat
from autotp_serving.engine.sampling_defaults import SamplingDefaults
from autotp_serving.request import RequestError

FIELDS = {
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "chat_template_kwargs": "reasoning",
}
"""Of a chat completion, and what here each is made of."""


def responses_routes(
    engine: EngineClient,
    chats: ChatAdmission,
    names: ModelNames,
    reasoning: ReasoningOptions,
    store: ResponseStore | None,
) -> APIRouter:
    """The one route, and those of a store."""
    routes = ResponsesRoutes(engine, chats, names, reasoning, store)
    router = APIRouter(prefix="/v1", tags=["openai"], redirect_slashes=False)
    router.add_api_route(
        "/responses",
        routes.create,
        methods=["POST"],
        response_class=Response,
        responses=WHOLE_OR_EVENTS,
    )
    if store is not None:
        store.add_routes(router)
    return router


class ResponsesRoutes:
    """The handler of this route. Its docstring is the description in the OpenAPI schema.

    Args:
        engine: runs what was admitted.
        chats: makes requests of conversations.
        names: of the model.
        reasoning: what the chat template can be told about it.
        store: of responses; None where none are kept.
    """

    def __init__(
        self,
        engine: EngineClient,
        chats: ChatAdmission,
        names: ModelNames,
        reasoning: ReasoningOptions,
        store: ResponseStore | None,
    ) -> None:
        self._engine = engine
        self._chats = chats
        self._names = names
        self._reasoning = reasoning
        self._store = store
        self._memory = ItemMemory()

    async def create(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, in items."""
        record = request.state.record
        tools = ChatTools(body)
        earlier = self._read_earlier(body, record.tenant)
        messages = to_messages(body, partial(self._memory.find, record.tenant), earlier)
        fields = {name: one for name, one in FIELDS.items() if name not in body.model_fields_set}
        with naming_fields(fields):
            chat = ChatRequest.model_validate(self._chat_fields(body, tools, messages))
            head = self._names.head(chat, record, "resp_")
            admitted = await self._chats.admit(chat, record, length_field="max_output_tokens")
        writer = ResponsesWriter(
            _describe(body, head, self._names.sampling_defaults)
            | {"store": self._store is not None and body.store is not False},
            record.usage,
            admitted.parsers[0],
            tools.names,
            ListedLogprobs(self._chats.admission.tokenizer),
            shows_summary=body.shows_summary,
            keep=partial(self._keep, body, record.tenant),
        )
        return await answer(
            self._engine,
            request,
            admitted.requests,
            writer,
            streams=bool(body.stream),
            headers=ignored_header(self._list_ignored(body, tools)),
        )

    def _read_earlier(self, body: ResponsesRequest, tenant: str) -> list[InputItem]:
        """The conversation that a request goes on with."""
        if self._store is not None:
            return self._store.conversation(tenant, body.previous_response_id)
        if body.previous_response_id is not None:
            raise RequestError(
                "previous_response_id",
                "needs a server with --responses-store: send the conversation itself",
            )
        return []

    def _keep(self, body: ResponsesRequest, tenant: str, response: Mapping[str, Any]) -> None:
        """Remember a response that has ended, unless the client would not have it."""
        if body.store is not False:
            self._memory.keep_all(tenant, response["output"])
            if self._store is not None:
                self._store.keep(tenant, input_items(body), response)

    def _chat_fields(
        self, body: ResponsesRequest, tools: ChatTools, messages: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The body of the chat completion that is asked for."""
        effort = None if body.reasoning is None else body.reasoning.effort
        is_wanted = None if effort is None else effort != "none"
        template = self._reasoning.for_template(is_wanted, effort if is_wanted else None)
        fields = {
            **{name: getattr(body, name) for name in SampledRequest.model_fields},
            "model": body.model,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": body.wants_logprobs or None,
            "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
            "tools": tools.tools or None,
            "tool_choice": tools.choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "priority": body.priority,
            "response_format": _response_format(body),
            "chat_template_kwargs": template | (body.chat_template_kwargs or {}),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _list_ignored(self, body: ResponsesRequest, tools: ChatTools) -> list[str]:
        ignored = [*list_ignored(body), *tools.ignored]
        if body.store is not None and self._store is None:
            ignored.insert(0, "store")
        if set(body.include or ()) - {LOGPROBS}:
            ignored.append("include")
        if body.text is not None:
            ignored += [f"text.{name}" for name in list_ignored(body.text)]
        effort = None if body.reasoning is None else body.reasoning.effort
        heeds = self._reasoning.switch if effort == "none" else self._reasoning.has_effort
        if effort is not None and not heeds:
            ignored.append("reasoning.effort")
        return ignored


def _response_format(body: ResponsesRequest) -> ResponseFormat | dict[str, Any] | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None:
        return body.response_format
    if body.response_format is not None:
        raise RequestError("response_format", "cannot be combined with text.format")
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema = {"name": wanted.name or "answer", "schema": wanted.schema_}
    return {"type": "json_schema", "json_schema": schema}


def _describe(
    body: ResponsesRequest, head: dict[str, Any], defaults: SamplingDefaults
) -> dict[str, Any]:
    """The fields of a response that are known before there is any output."""
    sent = body.model_dump(exclude_none=True, by_alias=True)
    text = sent.get("text", {})
    reasoning = sent.get("reasoning", {})
    return {
        "id": head["id"],
        "object": "response",
        "created_at": head["created"],
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": head["model"],
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None} | reasoning,
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": sent.get("tool_choice", "auto"),
        "tools": sent.get("tools", []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
