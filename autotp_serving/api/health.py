"""/health, /ready, /version and /metrics: is the server alive, what is it, how is it. Rank 0."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from autotp_serving import __version__
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import ApiError
from autotp_serving.api.metrics import CONTENT_TYPE, render
from autotp_serving.api.readiness import Readiness


def health_routes(engine: EngineClient, model_name: str) -> APIRouter:
    """Routes about the server itself."""
    router = APIRouter(tags=["server"], redirect_slashes=False)
    readiness = Readiness(engine)

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine is alive; 503 with the cause once it has failed."""
        if engine.engine.failure is not None:
            raise ApiError(503, engine.engine.failure, code="engine_failed")
        status = "draining" if engine.is_draining else "ok"
        return JSONResponse({"status": status, **asdict(engine.engine.stats())})

    @router.get("/ready")
    async def ready() -> dict[str, str | float]:
        """200 if a step went through all ranks lately, or goes through now; else 503."""
        age = await readiness.check()
        return {"status": "ready", "seconds_since_last_step": round(age, 3)}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        text = render(
            engine.engine.stats(),
            engine.latencies,
            engine.num_refused,
            engine.engine.rank_times,
            model_name,
        )
        return Response(text, media_type=CONTENT_TYPE)

    return router
