"""The real application over the real engine and a fake runner, in process or as a server.

`python -m tests.api.service '{"delay": 0.01, "config": {"port": 8123}}'` serves it. As a server it
also takes "seconds", for how long a connection may wait, a body take and a client not read, and
"files", for how many the process may have open.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from autotp_serving.api import connections, http_protocol, request_body
from autotp_serving.api.api_keys import load_api_keys
from autotp_serving.api.app import build_app
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.port import reserve_port
from autotp_serving.api.server import serve
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.engine.engine import Engine
from autotp_serving.logs import configure_logging
from tests.fakes import ByteTokenizer, FakeRunner, answers

MAX_MODEL_LEN = 512
BOOK = {
    "What is AI?": "a branch of computer science",
    "user: What is AI?\nassistant: ": "A branch of computer science.",
    "system: Be brief.\nuser: What is AI?\nuser: now\nassistant: ": "Science.",
    "emoji": "ab\N{GRINNING FACE}c\N{EARTH GLOBE EUROPE-AFRICA}",
    "lines": "one\ntwo\u2028three",
}


@dataclass
class Service:
    """Everything a test may want to look at."""

    app: FastAPI
    engine: EngineClient
    runner: FakeRunner
    config: ServingConfig


def build_service(
    *,
    delay: float = 0.0,
    num_blocks: int = 2048,
    fail_at_step: int | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    config: dict[str, Any] | None = None,
    book: dict[str, str] | None = None,
    model_path: str = "fake/letters",
    traces: Any = None,
) -> Service:
    """Wire application, engine and fake runner as serving.py wires the real ones."""
    serving_config = ServingConfig(model_path=model_path, **(config or {}))
    runner = FakeRunner(
        num_blocks, next_token=answers(BOOK | (book or {})), delay=delay, fail_at_step=fail_at_step
    )
    runner.pools = serving_config.pools
    tokenizer = ByteTokenizer()
    engine = EngineClient(
        lambda sink: Engine(runner, tokenizer, serving_config, max_model_len, sink),
        serving_config.request_timeout,
    )
    api_keys = load_api_keys(serving_config, {})
    app = build_app(engine, tokenizer, serving_config, max_model_len, api_keys, traces=traces)
    return Service(app, engine, runner, serving_config)


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """Start the engine thread and stop it again."""
    service.engine.engine.start()
    try:
        yield service
    finally:
        service.engine.engine.shutdown(0.0)


@asynccontextmanager
async def client(**options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """An HTTP client inside this process, and the service that it talks to."""
    with running(build_service(**options)) as service:
        transport = httpx.ASGITransport(service.app, raise_app_exceptions=False)
        async with (
            service.app.router.lifespan_context(service.app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            yield http, service


def main() -> int:
    """Serve until a signal comes."""
    options = json.loads(sys.argv[1])
    settings = options.get("config", {})
    if "seconds" in options:
        connections.WAIT_SECONDS = request_body.BODY_SECONDS = options.pop("seconds")
        http_protocol.STUCK_SECONDS = connections.WAIT_SECONDS
    if "files" in options:
        num_files = options.pop("files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    configure_logging(settings.get("log_level", "info"), settings.get("log_format", "text"))
    try:
        sock = reserve_port("127.0.0.1", settings.get("port", 0))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    with running(build_service(**options)) as service:
        return serve(service.app, service.engine, service.config, sock)


if __name__ == "__main__":
    sys.exit(main())
