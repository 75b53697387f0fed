"""/v1/completions, /v1/chat/completions and /v1/models, as OpenAI's clients know them. Rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.ignored_fields import ignored_header, list_ignored
from autotp_serving.api.openai.chat_admission import ChatAdmission
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.openai.schemas import CompletionRequest
from autotp_serving.api.openai.writers import ChatWriter, CompletionWriter
from autotp_serving.api.reply import WHOLE_OR_EVENTS, answer
from autotp_serving.request import Request as EngineRequest
from autotp_serving.request import SamplingParams
from autotp_serving.structured_output import StructuredOutput


def openai_routes(engine: EngineClient, chats: ChatAdmission, names: ModelNames) -> APIRouter:
    """The routes under /v1."""
    routes = OpenAIRoutes(engine, chats, names)
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
        chats: makes requests of bodies.
        names: of the model.
    """

    def __init__(self, engine: EngineClient, chats: ChatAdmission, names: ModelNames) -> None:
        self._engine = engine
        self._chats = chats
        self._admission = chats.admission
        self._names = names

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        admission = self._admission
        record = request.state.record
        record.headers |= ignored_header(list_ignored(body))
        head = self._names.head(body, record, "cmpl-")
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
                priority=body.priority,
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
        return await answer(self._engine, request, requests, writer, streams=bool(body.stream))

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        record = request.state.record
        ignored = list_ignored(body)
        if not self._chats.parsers.reasoning_options.heeds(body.reasoning_effort):
            ignored.append("reasoning_effort")
        record.headers |= ignored_header(ignored)
        head = self._names.head(body, record, "chatcmpl-")
        chat = await self._chats.admit(body, record)
        writer = ChatWriter(
            head,
            chat.requests,
            record.usage,
            body.include_usage,
            self._admission.tokenizer,
            body.always_usage,
            parsers=chat.parsers,
            shows_token_ids=bool(body.return_token_ids),
            num_prompt_logprobs=body.prompt_logprobs,
        )
        return await answer(self._engine, request, chat.requests, writer, streams=bool(body.stream))

    async def models(self) -> dict[str, Any]:
        """The names under which the model is served, and those of its adapters."""
        return {"object": "list", "data": [self._names.card(name) for name in self._names.listed]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of these names."""
        return self._names.card(name)

    def _text_of(self, prompt: str | Sequence[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._admission.tokenizer.decode(prompt, skip_special_tokens=False)

    def _make_choices(
        self, body: CompletionRequest, max_tokens: int, wanted: tuple[str, StructuredOutput] | None
    ) -> list[SamplingParams]:
        """How to sample each completion to one prompt."""
        structured_output = wanted and wanted[1]
        defaults = self._names.sampling_defaults
        choices = range(body.num_sampled)
        return [
            body.sampling_params(max_tokens, choice, structured_output, defaults)
            for choice in choices
        ]
