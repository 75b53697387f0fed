"""/health, /ready, /version and /metrics: is the server alive, what is it, how is it. Rank 0."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from autotp_serving import __version__
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import ApiError
from autotp_serving.api.metrics import CONTENT_TYPE, GroupFigures, render
from autotp_serving.api.readiness import Readiness
from autotp_serving.engine import EngineGroups


def health_routes(engine: EngineClient, model_name: str, task: str) -> APIRouter:
    """Routes about the server itself."""
    routes = HealthRoutes(engine, model_name, task)
    router = APIRouter(tags=["server"], redirect_slashes=False)
    router.add_api_route("/health", routes.health, methods=["GET"])
    router.add_api_route("/ready", routes.ready, methods=["GET"])
    router.add_api_route("/version", routes.version, methods=["GET"])
    router.add_api_route(
        "/metrics", routes.metrics, methods=["GET"], response_class=PlainTextResponse
    )
    return router


class HealthRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema.

    Args:
        engine: whose health it is.
        model_name: a label of the metrics.
        task: what the model is served for.
    """

    def __init__(self, engine: EngineClient, model_name: str, task: str) -> None:
        self._client = engine
        self._model_name = model_name
        self._task = task
        self._readiness = Readiness(engine, pools=task != "generate")

    async def health(self) -> Response:
        """200 while the engine is alive, or waits for ranks that are started anew; 503 with the
        cause once it has failed."""
        engine = self._client.engine
        if engine.failure is not None:
            raise ApiError(503, engine.failure, code="engine_failed")
        groups = self._list_groups()
        is_whole = all(group["status"] == "ok" for group in groups)
        status = "recovering" if engine.outage is not None else "ok" if is_whole else "degraded"
        status = "draining" if self._client.is_draining else status
        reply = {"status": status, "task": self._task, **asdict(engine.stats())}
        return JSONResponse(reply | ({"groups": groups} if groups else {}))

    async def ready(self) -> dict[str, Any]:
        """200 if a step went through all ranks lately, or goes through now; else 503. Of several
        groups of ranks, one is enough."""
        age = await self._readiness.check()
        reply = {"status": "ready", "seconds_since_last_step": round(age, 3)}
        groups = {str(group["group"]): group["status"] for group in self._list_groups()}
        return reply | ({"groups": groups} if groups else {})

    async def version(self) -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        groups = [
            GroupFigures(one.stats(), one.rank_times, one.outage is None)
            for one in self._client.engines
        ]
        text = render(groups, self._client.latencies, self._client.num_refused, self._model_name)
        return Response(text, media_type=CONTENT_TYPE)

    def _list_groups(self) -> list[dict[str, Any]]:
        """The state of each group of ranks; nothing where there is but one."""
        engine = self._client.engine
        if not isinstance(engine, EngineGroups):
            return []
        return [
            {"group": one.index, "status": one.status, **asdict(one.stats())}
            for one in engine.engines
        ]
