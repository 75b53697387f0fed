"""/v1/rerank in Cohere's and Jina's shape, /v1/score in vLLM's. Rank 0 only.

A checkpoint with a classifier reads query and document as its tokenizer joins a pair of texts.
Qwen3-Reranker reads them in the words that its makers have published, and answers yes or no.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from autotp_serving.api.admission import Admission
from autotp_serving.api.ignored_fields import ignored_header, list_ignored
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.pooling.embeddings import count_usage
from autotp_serving.api.pooling.prompts import PromptPooler
from autotp_serving.api.pooling.schemas import RerankRequest, ScoreRequest
from autotp_serving.pooling import PoolingSettings
from autotp_serving.request import Pooling, RequestError

RERANK_PATHS = ("/v1/rerank", "/v2/rerank")

QWEN3_HEAD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
QWEN3_BODY = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
QWEN3_TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

Pair = tuple[str, str]


def rerank_routes(
    pooler: PromptPooler, admission: Admission, names: ModelNames, settings: PoolingSettings
) -> APIRouter:
    """All spellings of both routes."""
    routes = RerankRoutes(pooler, admission, names, settings)
    router = APIRouter(tags=["rerank"], redirect_slashes=False)
    for path in RERANK_PATHS:
        router.add_api_route(path, routes.rerank, methods=["POST"], response_class=JSONResponse)
    router.add_api_route("/v1/score", routes.score, methods=["POST"], response_class=JSONResponse)
    return router


class RerankRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        pooler: runs pairs.
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
        self._head: list[int] = []
        self._tail: list[int] = []
        if settings.label_tokens:  # the published recipe, with its prompt
            self._head, self._tail = (
                admission.tokenizer.encode(text, add_special_tokens=False)
                for text in (QWEN3_HEAD, QWEN3_TAIL)
            )

    async def rerank(self, body: RerankRequest, request: Request) -> Response:
        """Order documents by how relevant they are to a query."""
        record = request.state.record
        head = self._names.head(body, record, "rerank-")
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        scores = await self._score(
            body, [(body.query, text) for text in texts], request, "documents"
        )
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        results: list[dict[str, Any]] = []
        for index in order[: body.top_n or None]:
            results.append({"index": index, "relevance_score": scores[index]})
            if body.return_documents is not False:
                results[-1]["document"] = {"text": texts[index]}
        return JSONResponse({**head, "results": results, "usage": count_usage(record.usage)})

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        """Score pairs of texts."""
        record = request.state.record
        head = self._names.head(body, record, "score-")
        scores = await self._score(body, body.pairs(), request, "text_2")
        data = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(scores)
        ]
        return JSONResponse(
            {**head, "object": "list", "data": data, "usage": count_usage(record.usage)}
        )

    async def _score(
        self,
        body: RerankRequest | ScoreRequest,
        pairs: Sequence[Pair],
        request: Request,
        field_name: str,
    ) -> list[float]:
        record = request.state.record
        record.headers |= ignored_header(list_ignored(body))
        if body.instruction is not None and not self._settings.label_tokens:
            raise RequestError("instruction", "this model takes none: leave it out")
        encode = partial(self._encode, body.instruction or QWEN3_INSTRUCTION, field_name)
        pooling = Pooling(self._settings.method, whole=not self._settings.is_causal)
        vectors = await self._pooler.pool(pairs, encode, pooling, record, field_name, body.priority)
        is_probability = body.use_activation
        if is_probability is None:
            is_probability = self._settings.sigmoid
        return [_find_score(vector, is_probability) for vector in vectors]

    async def _encode(self, instruction: str, field_name: str, pair: Pair) -> list[int]:
        query, document = pair
        if not self._settings.label_tokens:
            return await self._admission.encode(query, pair=document, field_name=field_name)
        text = QWEN3_BODY.format(instruction=instruction, query=query, document=document)
        body = await self._admission.encode(text, field_name=field_name)
        return [*self._head, *body, *self._tail]


def _find_score(logits: array[float], is_probability: bool) -> float:
    """One logit, or that of yes against that of no, mostly as a probability."""
    logit = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    if not is_probability:
        return logit
    tail = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else tail) / (1.0 + tail)
