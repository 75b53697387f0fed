"""/health and /version: is the server alive, and what is it. Rank 0 only."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from autotp_serving import __version__
from autotp_serving.api.errors import ApiError
from autotp_serving.api.streams import AsyncEngine


def health_routes(engine: AsyncEngine) -> APIRouter:
    """Routes that ask nothing of the model."""
    router = APIRouter(tags=["server"], redirect_slashes=False)

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine is alive; 503 with the cause once it has failed."""
        if engine.engine.failure is not None:
            raise ApiError(503, engine.engine.failure, code="engine_failed")
        status = "draining" if engine.is_draining else "ok"
        return JSONResponse({"status": status, **asdict(engine.engine.stats())})

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    return router
