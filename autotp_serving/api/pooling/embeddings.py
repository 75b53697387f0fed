"""/v1/embeddings, as OpenAI's clients know it. Rank 0 only."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from array import array
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving.api.admission import Admission
from autotp_serving.api.ignored_fields import ignored_header, list_ignored
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.pooling.prompts import PromptPooler
from autotp_serving.api.pooling.schemas import EmbeddingRequest
from autotp_serving.pooling import PoolingSettings
from autotp_serving.request import Pooling, RequestError


def embedding_routes(
    pooler: PromptPooler, admission: Admission, names: ModelNames, settings: PoolingSettings
) -> APIRouter:
    """The one route."""
    routes = EmbeddingRoutes(pooler, admission, names, settings)
    router = APIRouter(tags=["openai"], redirect_slashes=False)
    router.add_api_route(
        "/v1/embeddings", routes.embeddings, methods=["POST"], response_class=JSONResponse
    )
    return router


class EmbeddingRoutes:
    """The handler of the route. Its docstring is the description in the OpenAPI schema.

    Args:
        pooler: runs inputs.
        admission: tokenizes them.
        names: of the model.
        settings: of the checkpoint.
    """

    def __init__(
        self,
        pooler: PromptPooler,
        admission: Admission,
        names: ModelNames,
        settings: PoolingSettings,
    ) -> None:
        self._pooler = pooler
        self._admission = admission
        self._names = names
        self._settings = settings
        self._end: list[int] = []
        if settings.end_text:
            self._end = admission.tokenizer.encode(settings.end_text, add_special_tokens=False)

    async def embeddings(self, body: EmbeddingRequest, request: Request) -> Response:
        """Embed one or several inputs."""
        record = request.state.record
        record.headers |= ignored_header(list_ignored(body))
        head = self._names.head(body, record, "embd-")
        prompt = self._find_prompt(body.prompt_name)
        vectors = await self._pooler.pool(
            body.input,
            partial(self._encode, prompt),
            self._find_pooling(body),
            record,
            "input",
            body.priority,
        )
        write = encode_base64 if body.encoding_format == "base64" else write_numbers
        data = []
        for index, vector in enumerate(vectors):
            await asyncio.sleep(0)  # thousands of vectors are megabytes of text
            data.append(
                f'{{"object": "embedding", "index": {index}, "embedding": {write(vector)}}}'
            )
        rest = json.dumps({**head, "usage": count_usage(record.usage)})
        text = f'{{"object": "list", "data": [{", ".join(data)}], {rest[1:]}'
        return Response(text, media_type="application/json")

    def _find_pooling(self, body: EmbeddingRequest) -> Pooling:
        settings, dimensions = self._settings, body.dimensions
        if dimensions is not None:
            if dimensions > settings.size:
                raise RequestError("dimensions", f"must be at most {settings.size} for this model")
            if settings.dimensions and dimensions not in (*settings.dimensions, settings.size):
                raise RequestError(
                    "dimensions",
                    f"must be one of {', '.join(map(str, settings.dimensions))} for this model",
                )
        normalize = settings.normalize if body.normalize is None else body.normalize
        return Pooling(settings.method, normalize, dimensions, not settings.is_causal)

    def _find_prompt(self, name: str | None) -> str:
        """The text to put before each input."""
        prompts = self._settings.prompts
        if name is None:
            return prompts.get(self._settings.default_prompt or "", "")
        if name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise RequestError(
                "prompt_name", f"'{name}' is no prompt of this model; it has {known}"
            )
        return prompts[name]

    async def _encode(self, prompt: str, one: str | list[int]) -> list[int]:
        if not isinstance(one, str):
            return await self._admission.encode(one, field_name="input")
        token_ids = await self._admission.encode(prompt + one, field_name="input")
        if self._end and token_ids[-len(self._end) :] != self._end:
            token_ids = token_ids + self._end
        return token_ids


def encode_base64(vector: array[float]) -> str:
    """Float32 numbers as OpenAI's clients decode them: little-endian bytes in base64, in quotes."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return f'"{base64.b64encode(vector.tobytes()).decode("ascii")}"'


def write_numbers(vector: array[float]) -> str:
    """Float32 numbers as JSON, with as many digits as tell them apart."""
    return f"[{', '.join(['%.9g'] * len(vector))}]" % tuple(vector)


def count_usage(usage: Any) -> dict[str, int]:
    """What the call has cost, in OpenAI's words."""
    return {"prompt_tokens": usage.num_prompt_tokens, "total_tokens": usage.num_prompt_tokens}
