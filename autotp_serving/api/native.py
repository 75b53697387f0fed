"""The native routes, /generate/ and /generate_stream/, as the seed page has them. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving.api.admission import Admission
from autotp_serving.api.errors import check_reason
from autotp_serving.api.native_schemas import GenerateReply, GenerateRequest
from autotp_serving.api.responses import TokenStreamResponse
from autotp_serving.api.streams import AsyncEngine
from autotp_serving.request import Request as EngineRequest
from autotp_serving.request import RequestOutput

LINE_TYPE = "application/x-ndjson"
LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {LINE_TYPE: {"schema": {"$ref": "#/components/schemas/GenerateReply"}}}}
}


def native_routes(engine: AsyncEngine, admission: Admission) -> APIRouter:
    """Both routes, each under both spellings of its path; neither redirects."""
    router = APIRouter(tags=["native"], redirect_slashes=False)

    async def admit(body: GenerateRequest, request: Request) -> list[EngineRequest]:
        admission.check_named_tokens(body)
        wanted = body.structure()
        grammar = await admission.compile(wanted)
        return admission.admit(
            await admission.encode(body.prompt),
            [body.sampling_params(wanted and wanted[1])],
            request.state.record,
            length_field="n_predict",
            grammar=grammar,
        )

    @router.post("/generate", include_in_schema=False)
    @router.post("/generate/", response_model=GenerateReply)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt and answer once, when the text is complete."""
        text = []
        usage = request.state.record.usage
        with engine.open(await admit(body, request), usage) as stream:
            async for outputs in stream:
                text.extend(output.text for output in outputs)
                last = outputs[-1]
        check_reason(last)
        return JSONResponse(reply(0, "".join(text), last.finish_reason))

    @router.post("/generate_stream", include_in_schema=False)
    @router.post("/generate_stream/", response_class=Response, responses=LINES)
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt and answer in lines: a JSON object per token, then a last one."""
        return TokenStreamResponse(
            engine,
            await admit(body, request),
            LineWriter(),
            media_type=LINE_TYPE,
        )

    return router


def reply(index: int, content: str | None, finish_reason: str | None) -> dict[str, Any]:
    """The reply's shape, the same for both routes."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": content},
        "finish_reason": finish_reason,
    }


class LineWriter:
    """Renders outputs as lines: one per token, counted from 0, then one with the reason."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def __call__(self, outputs: Sequence[RequestOutput]) -> bytes:
        lines = []
        for output in outputs:
            # Text of a step that made several tokens goes with the last of them.
            texts = [""] * (len(output.token_ids) - 1)
            if output.token_ids or output.text:
                texts.append(output.text)
            for text in texts:
                lines.append(reply(self.num_tokens, text, None))
                self.num_tokens += 1
            if output.finish_reason is not None:
                last = reply(self.num_tokens, None, output.finish_reason)
                lines.append(last | {"error": output.error} if output.error else last)
        # ASCII escapes: line readers of some clients also split at U+2028 and its kin.
        return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
