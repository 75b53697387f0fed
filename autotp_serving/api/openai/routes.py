"""/v1/completions, /v1/chat/completions and /v1/models, as OpenAI's clients know them. Rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving.api.admission import Admission
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.ignored_fields import ignored_header, list_ignored
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.completion_parser import NO_TOOLS, CompletionParsers
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.openai.schemas import CompletionRequest, OpenAIRequest
from autotp_serving.api.openai.writers import ChatWriter, ChoiceWriter, CompletionWriter
from autotp_serving.api.streaming_response import TokenStreamResponse
from autotp_serving.request import Request as EngineRequest
from autotp_serving.request import SamplingParams
from autotp_serving.structured_output import StructuredOutput

EVENT_TYPE = "text/event-stream"
WHOLE_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, EVENT_TYPE: {}}}
}


def openai_routes(
    engine: EngineClient, admission: Admission, names: ModelNames, parsers: CompletionParsers
) -> APIRouter:
    """The routes under /v1."""
    routes = OpenAIRoutes(engine, admission, names, parsers)
    router = APIRouter(prefix="/v1", tags=["openai"], redirect_slashes=False)
    router.add_api_route(
        "/completions",
        routes.completions,
        methods=["POST"],
        response_class=Response,
        responses=WHOLE_OR_EVENTS,
    )
    router.add_api_route(
        "/chat/completions",
        routes.chat_completions,
        methods=["POST"],
        response_class=Response,
        responses=WHOLE_OR_EVENTS,
    )
    router.add_api_route("/models", routes.models, methods=["GET"])
    router.add_api_route("/models/{name:path}", routes.model, methods=["GET"])
    return router


class OpenAIRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        engine: runs what was admitted.
        admission: makes requests of bodies.
        names: of the model.
        parsers: of reasoning and tool calls in what the model writes.
    """

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        names: ModelNames,
        parsers: CompletionParsers,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._names = names
        self._parsers = parsers

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        admission = self._admission
        record = request.state.record
        record.headers |= ignored_header(list_ignored(body))
        head = self._names.head(body, record.request_id, "cmpl-")
        admission.check_named_tokens(body)
        admission.check_num_completions(
            len(body.prompt), body.num_sampled, "best_of" if body.best_of else "n"
        )
        wanted = body.structured_output()
        grammar = await admission.compile(wanted)
        requests: list[EngineRequest] = []
        echoes: list[str] = []
        for prompt in body.prompt:
            token_ids = await admission.encode(prompt)
            max_tokens = body.max_new_tokens(admission.num_tokens_left(token_ids))
            requests += admission.admit(
                token_ids,
                self._make_choices(body, max_tokens, wanted),
                record,
                first_choice=len(requests),
                grammar=grammar,
            )
            echo = self._text_of(prompt) if body.echo else ""
            echoes += [echo] * body.num_sampled
        writer = CompletionWriter(
            head,
            requests,
            record.usage,
            body.include_usage,
            admission.tokenizer,
            body.always_usage,
            echoes=echoes,
            num_logprobs=body.logprobs,
            num_kept=(body.num_choices, body.num_sampled),
            shows_token_ids=bool(body.return_token_ids),
            num_prompt_logprobs=body.prompt_logprobs,
        )
        return await self._answer(body, request, requests, writer)

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        admission, parsers = self._admission, self._parsers
        record = request.state.record
        record.headers |= ignored_header(list_ignored(body))
        head = self._names.head(body, record.request_id, "chatcmpl-")
        admission.check_named_tokens(body)
        admission.check_num_completions(1, body.num_sampled)
        tool_format = parsers.call_format(is_required=body.requires_call)
        if body.tools and tool_format is None:
            record.headers["X-Warning"] = NO_TOOLS
        names_called = {tool.function.name for tool in body.callable_tools}
        messages, options = body.for_template(knows_tools=parsers.tool_format is not None)
        token_ids = await admission.encode_chat(messages, options)
        reasoning = parsers.reasoning(token_ids)
        wanted = body.whole_structured_output(tool_format, reasoning)
        grammar = await admission.compile(wanted)
        max_tokens = body.max_new_tokens(admission.num_tokens_left(token_ids))
        requests = admission.admit(
            token_ids,
            self._make_choices(body, max_tokens, wanted),
            record,
            prompt_field="messages",
            length_field="max_tokens" if body.max_tokens else "max_completion_tokens",
            grammar=grammar,
        )
        max_calls = 1 if body.allows_one_call else None
        writer = ChatWriter(
            head,
            requests,
            record.usage,
            body.include_usage,
            admission.tokenizer,
            body.always_usage,
            parsers=[
                parsers.make(
                    reasoning,
                    names_called,
                    max_calls,
                    is_chosen=body.names_one_tool,
                    is_required=body.requires_call,
                )
                for _ in requests
            ],
            shows_token_ids=bool(body.return_token_ids),
            num_prompt_logprobs=body.prompt_logprobs,
        )
        return await self._answer(body, request, requests, writer)

    async def models(self) -> dict[str, Any]:
        """The names under which the model is served."""
        return {"object": "list", "data": [self._names.card(name) for name in self._names.names]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of these names."""
        return self._names.card(name)

    async def _answer(
        self,
        body: OpenAIRequest,
        request: Request,
        requests: list[EngineRequest],
        writer: ChoiceWriter,
    ) -> Response:
        """Run what was admitted, and reply as a whole or in events."""
        if body.stream:
            return TokenStreamResponse(
                self._engine, requests, writer.events, tail=writer.end, media_type=EVENT_TYPE
            )
        with self._engine.open(requests, request.state.record.usage) as stream:
            async for outputs in stream:
                writer.collect(outputs)
        return JSONResponse(writer.reply())

    def _text_of(self, prompt: str | Sequence[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._admission.tokenizer.decode(prompt, skip_special_tokens=False)

    def _make_choices(
        self, body: OpenAIRequest, max_tokens: int, wanted: tuple[str, StructuredOutput] | None
    ) -> list[SamplingParams]:
        """How to sample each completion to one prompt."""
        structured_output = wanted and wanted[1]
        defaults = self._names.sampling_defaults
        choices = range(body.num_sampled)
        return [
            body.sampling_params(max_tokens, choice, structured_output, defaults)
            for choice in choices
        ]
