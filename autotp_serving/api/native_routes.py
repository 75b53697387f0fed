"""The native routes, /generate/ and /generate_stream/, as in ipex-llm's guide. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving.api.admission import Admission
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import check_reason
from autotp_serving.api.logprobs import ListedLogprobs
from autotp_serving.api.native_schemas import GenerateReply, GenerateRequest
from autotp_serving.api.streaming_response import TokenStreamResponse
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import Request as EngineRequest
from autotp_serving.request import RequestOutput

LINE_TYPE = "application/x-ndjson"
LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {LINE_TYPE: {"schema": {"$ref": "#/components/schemas/GenerateReply"}}}}
}


def native_routes(engine: EngineClient, admission: Admission) -> APIRouter:
    """Both routes, each under both spellings of its path; neither redirects."""
    routes = NativeRoutes(engine, admission)
    router = APIRouter(tags=["native"], redirect_slashes=False)
    router.add_api_route(
        "/generate/", routes.generate, methods=["POST"], response_model=GenerateReply
    )
    router.add_api_route("/generate", routes.generate, methods=["POST"], include_in_schema=False)
    router.add_api_route(
        "/generate_stream/",
        routes.generate_stream,
        methods=["POST"],
        response_class=Response,
        responses=LINES,
    )
    router.add_api_route(
        "/generate_stream", routes.generate_stream, methods=["POST"], include_in_schema=False
    )
    return router


class NativeRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        engine: runs what was admitted.
        admission: makes requests of bodies.
    """

    def __init__(self, engine: EngineClient, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    async def generate(self, body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt and reply once, when the text is complete."""
        requests = await self._admit(body, request)
        writer = LineWriter(body, requests[0], self._admission.tokenizer)
        text: list[str] = []
        logprobs: list[dict[str, Any]] = []
        with self._engine.open(requests, request.state.record.usage) as stream:
            async for outputs in stream:
                for output in outputs:
                    text.append(writer.text(output))
                    logprobs += writer.logprobs(output)
                last = outputs[-1]
        check_reason(last)
        whole = reply(0, "".join(text), last.finish_reason)
        return JSONResponse(whole if body.logprobs is None else whole | {"logprobs": logprobs})

    async def generate_stream(self, body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt and reply in lines: a JSON object per token, then a last one."""
        requests = await self._admit(body, request)
        writer = LineWriter(body, requests[0], self._admission.tokenizer)
        return TokenStreamResponse(self._engine, requests, writer, media_type=LINE_TYPE)

    async def _admit(self, body: GenerateRequest, request: Request) -> list[EngineRequest]:
        self._admission.check_named_tokens(body)
        wanted = body.structured_output()
        grammar = await self._admission.compile(wanted)
        return self._admission.admit(
            await self._admission.encode(body.prompt),
            [body.sampling_params(wanted and wanted[1])],
            request.state.record,
            length_field="n_predict",
            grammar=grammar,
            priority=body.priority,
        )


def reply(index: int, content: str | None, finish_reason: str | None) -> dict[str, Any]:
    """The reply's shape, the same for both routes."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": content},
        "finish_reason": finish_reason,
    }


class LineWriter:
    """Renders outputs as lines: one per token, counted from 0, then one with the reason.

    Args:
        body: asks for logprobs and for the prompt, or does not.
        request: made of the body.
        tokenizer: knows the tokens that logprobs are about.
    """

    def __init__(self, body: GenerateRequest, request: EngineRequest, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._body = body
        self._echo = body.prompt if body.echo else ""
        self._first_token = request.prompt_token_ids[0]
        self._listed = ListedLogprobs(tokenizer)

    def text(self, output: RequestOutput) -> str:
        """What an output adds to the text; the first one brings the prompt, if that is wanted."""
        echo, self._echo = self._echo, ""
        return echo + output.text

    def logprobs(self, output: RequestOutput) -> list[dict[str, Any]]:
        """The logprobs that an output brings, those of the prompt before the first token's."""
        if output.prompt_logprobs is None:
            return self._listed.write(output.logprobs)
        prompt = [self._listed.write_first(self._first_token)]
        return prompt + self._listed.write([*output.prompt_logprobs, *output.logprobs])

    def __call__(self, outputs: Sequence[RequestOutput]) -> bytes:
        lines = []
        for output in outputs:
            # Text of a step that made several tokens goes with the last of them, and so do its
            # logprobs.
            pieces = [reply(self.num_tokens + n, "", None) for n in range(len(output.token_ids))]
            text = self.text(output)
            if text and not pieces:
                pieces.append(reply(self.num_tokens, "", None))
            if pieces:
                pieces[-1]["message"]["content"] = text
                if self._body.logprobs is not None:
                    pieces[-1]["logprobs"] = self.logprobs(output)
            self.num_tokens += len(pieces)
            lines += pieces
            if output.finish_reason is not None:
                last = reply(self.num_tokens, None, output.finish_reason)
                lines.append(last | {"error": output.error} if output.error else last)
        # ASCII escapes: line readers of some clients also split at U+2028 and its kin.
        return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
