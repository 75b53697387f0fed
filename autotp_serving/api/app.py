"""The HTTP application: which routes there are and what surrounds them. Rank 0 only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.params import Depends as Dependency
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from autotp_serving import __version__
from autotp_serving.api.adapter_routes import adapter_routes
from autotp_serving.api.admission import Admission
from autotp_serving.api.anthropic.routes import anthropic_routes
from autotp_serving.api.api_keys import ApiKeys
from autotp_serving.api.chat_page import page_routes
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import ApiError, install_error_handlers
from autotp_serving.api.health import health_routes
from autotp_serving.api.hosts import find_allowed_hosts
from autotp_serving.api.middleware import RequestGuard
from autotp_serving.api.native_routes import native_routes
from autotp_serving.api.openai.chat_admission import ChatAdmission
from autotp_serving.api.openai.completion_parser import CompletionParsers
from autotp_serving.api.openai.model_names import ModelNames
from autotp_serving.api.openai.routes import openai_routes
from autotp_serving.api.pooling.embeddings import embedding_routes
from autotp_serving.api.pooling.prompts import PromptPooler
from autotp_serving.api.pooling.rerank import rerank_routes
from autotp_serving.api.responses.routes import responses_routes
from autotp_serving.api.responses.store import ResponseStore
from autotp_serving.api.route_paths import RoutePaths
from autotp_serving.api.schemas import ErrorReply
from autotp_serving.api.tokenize_routes import token_routes
from autotp_serving.api.traces import Traces
from autotp_serving.config import ServingConfig
from autotp_serving.engine.sampling_defaults import read_sampling_defaults
from autotp_serving.engine.sandbox import Sandbox
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.pooling import PoolingSettings, read_pooling

ROUTES_OF_TASK = {
    "generate": "/v1/chat/completions or /v1/completions",
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank or /v1/score",
}


def build_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: ServingConfig,
    max_model_len: int,
    api_keys: ApiKeys,
    sandbox: Sandbox | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """Put the application together around a running engine.

    Args:
        sandbox: tries out what clients send; None makes one that starts when it is needed.
        traces: told of every request; None makes none.
    """
    sandbox = sandbox or Sandbox(tokenizer)
    engine.traces = traces

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.bind(asyncio.get_running_loop())
        yield
        sandbox.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="AutoTP Serving",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages come from the internet; ours are in page_routes
        redoc_url=None,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    install_error_handlers(app)
    admission = Admission(tokenizer, max_model_len, config, sandbox)
    defaults = read_sampling_defaults(Path(config.model_path), config.generation_config)
    one_engine = engine.one_engine
    adapters = None if one_engine is None else one_engine.adapters
    names = ModelNames(config, max_model_len, defaults, adapters)
    parsers = CompletionParsers(tokenizer, config)
    chats = ChatAdmission(admission, parsers, defaults)
    reasoning = parsers.reasoning_options
    pooling = PromptPooler(engine, admission, config), admission, names
    settings = read_pooling(config) or PoolingSettings()
    task = config.shown_task
    store = ResponseStore() if config.responses_store else None
    routers = [
        (native_routes(engine, admission), "generate"),
        (openai_routes(engine, chats, names), "generate"),
        (responses_routes(engine, chats, names, reasoning, store), "generate"),
        (anthropic_routes(engine, chats, names, reasoning), "generate"),
        (embedding_routes(*pooling, settings), "embed"),
        (rerank_routes(*pooling, settings), "rerank"),
        (token_routes(admission, names, parsers), task),
        (adapter_routes(engine, api_keys), "generate"),
        (page_routes(), task),
        (health_routes(engine, config.model_names[0], task), task),
    ]
    for router, of_task in routers:
        app.include_router(router, dependencies=[] if of_task == task else [refuse_for(task)])
    routes = [*app.routes, *(route for router, _ in routers for route in router.routes)]
    app.add_middleware(
        RequestGuard,
        paths=RoutePaths(route.path for route in routes if isinstance(route, Route)),
        max_body_size=config.max_body_size,
        large_bodies=admission.large_bodies,
        api_keys=api_keys,
        allowed_hosts=find_allowed_hosts(config),
        traces=traces,
    )
    if config.cors_origin:  # around the guard: pages may read its refusals, and ask without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", *(["DELETE"] if config.responses_store else [])],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Ignored-Fields", "X-Warning", "Retry-After"],
        )
    return app


def refuse_for(task: str) -> Dependency:
    """What refuses the calls of routes that a model of this task does not answer."""

    async def refuse(request: Request) -> None:
        if request.method == "POST":  # others ask for the model's names
            raise ApiError(
                400,
                f"{request.url.path} is not for this model, which is served with --task {task}: "
                f"call {ROUTES_OF_TASK[task]}",
                code="wrong_task",
            )

    dependency: Dependency = Depends(refuse)
    return dependency
