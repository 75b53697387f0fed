"""/v1/completions, /v1/chat/completions and /v1/models, as OpenAI's clients know them. Rank 0."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving import __version__
from autotp_serving.api.admission import Admission
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import ApiError
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.completion_parser import CompletionParsers
from autotp_serving.api.openai.schemas import CompletionRequest, OpenAIRequest
from autotp_serving.api.openai.writers import ChatWriter, ChoiceWriter, CompletionWriter
from autotp_serving.api.streaming_response import TokenStreamResponse
from autotp_serving.config import ServingConfig
from autotp_serving.request import Request as EngineRequest
from autotp_serving.request import SamplingParams
from autotp_serving.structured_output import StructuredOutput

EVENT_TYPE = "text/event-stream"
WHOLE_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, EVENT_TYPE: {}}}
}


class ModelNames:
    """The names under which the one model is served."""

    def __init__(self, config: ServingConfig, max_model_len: int) -> None:
        self.names = config.model_names
        # As vLLM's clients call a model that was given no other name; shown to nobody.
        self._path = None if config.served_model_name else config.model_path.rstrip("/")
        self._max_model_len = max_model_len
        self._created = int(time.time())
        setup = f"{__version__} {config.model_path} {config.low_bit} {config.dtype}"
        self.fingerprint = f"fp_{hashlib.sha256(setup.encode()).hexdigest()[:12]}"

    def check(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a name that is not served."""
        if name is None:
            return self.names[0]
        if name not in self.names and name.rstrip("/") != self._path:
            raise ApiError(
                404,
                f"model: '{name}' is not served here; served: {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def card(self, name: str) -> dict[str, Any]:
        """What /v1/models tells of a name."""
        return {
            "id": self.check(name),
            "object": "model",
            "created": self._created,
            "owned_by": "autotp-serving",
            "max_model_len": self._max_model_len,
        }

    def head(self, body: OpenAIRequest, request_id: str, prefix: str) -> dict[str, Any]:
        """Fields that start every reply."""
        return {
            "id": request_id.replace("req-", prefix),
            "created": int(time.time()),
            "model": self.check(body.model),
            "system_fingerprint": self.fingerprint,
        }


def openai_routes(
    engine: EngineClient, admission: Admission, names: ModelNames, parsers: CompletionParsers
) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["openai"], redirect_slashes=False)

    async def answer(
        body: OpenAIRequest, request: Request, requests: list[EngineRequest], writer: ChoiceWriter
    ) -> Response:
        if body.stream:
            return TokenStreamResponse(
                engine, requests, writer.events, tail=writer.end, media_type=EVENT_TYPE
            )
        with engine.open(requests, request.state.record.usage) as stream:
            async for outputs in stream:
                writer.collect(outputs)
        return JSONResponse(writer.reply())

    @router.post("/completions", response_class=Response, responses=WHOLE_OR_EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        record = request.state.record
        head = names.head(body, record.request_id, "cmpl-")
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
                sampling(body, max_tokens, wanted),
                record,
                first_choice=len(requests),
                grammar=grammar,
            )
            echo = prompt_text(prompt) if body.echo else ""
            echoes += [echo] * body.num_sampled
        writer = CompletionWriter(
            head,
            requests,
            record.usage,
            body.include_usage,
            admission.tokenizer,
            body.always_usage,
            echoes=echoes,
            has_logprobs=body.logprobs is not None,
            num_kept=(body.num_choices, body.num_sampled),
        )
        return await answer(body, request, requests, writer)

    def sampling(
        body: OpenAIRequest, max_tokens: int, wanted: tuple[str, StructuredOutput] | None
    ) -> list[SamplingParams]:
        structured_output = wanted and wanted[1]
        choices = range(body.num_sampled)
        return [body.sampling_params(max_tokens, choice, structured_output) for choice in choices]

    def prompt_text(prompt: str | Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else admission.tokenizer.decode(prompt)

    @router.post("/chat/completions", response_class=Response, responses=WHOLE_OR_EVENTS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        record = request.state.record
        head = names.head(body, record.request_id, "chatcmpl-")
        admission.check_named_tokens(body)
        admission.check_num_completions(1, body.num_sampled)
        names_called = {tool.function.name for tool in body.callable_tools}
        if names_called:
            parsers.check_tools()
        token_ids = await admission.encode_chat(
            [message.for_template() for message in body.messages], body.template_options()
        )
        reasoning = parsers.reasoning(token_ids)
        wanted = body.whole_structured_output(parsers.tool_format, reasoning)
        grammar = await admission.compile(wanted)
        max_tokens = body.max_new_tokens(admission.num_tokens_left(token_ids))
        requests = admission.admit(
            token_ids,
            sampling(body, max_tokens, wanted),
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
                parsers.make(reasoning, names_called, max_calls, is_chosen=body.names_one_tool)
                for _ in requests
            ],
        )
        return await answer(body, request, requests, writer)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The names under which the model is served."""
        return {"object": "list", "data": [names.card(name) for name in names.names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of these names."""
        return names.card(name)

    return router
