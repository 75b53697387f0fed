"""/v1/load_lora_adapter and /v1/unload_lora_adapter, for admins alone. Rank 0."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from autotp_serving.api.api_keys import ApiKeys
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import ApiError
from autotp_serving.api.schemas import NonEmptyText, StrictModel
from autotp_serving.engine import EngineError
from autotp_serving.request import AdapterError

MAX_SECONDS = 120.0
"""For the step under way to end, and for the ranks to take an adapter in."""

MAX_PATH_LEN = 4096


class LoadAdapterRequest(StrictModel):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: NonEmptyText = Field(description="the name by which requests ask for it (`model`)")
    lora_path: Annotated[NonEmptyText, Field(max_length=MAX_PATH_LEN)] = Field(
        description="folder on the server's host, as PEFT saves it"
    )


class UnloadAdapterRequest(StrictModel):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: NonEmptyText = Field(description="the name that it was loaded under")


def adapter_routes(engine: EngineClient, api_keys: ApiKeys) -> APIRouter:
    """Routes that change which adapters there are."""

    async def check_admin(request: Request) -> None:
        if not api_keys.is_admin(request.scope["headers"]):
            cure = "show an admin's key" if api_keys.has_admins else "start with --admin-api-key"
            raise ApiError(
                403, f"{request.url.path} is for admins: {cure}", code="admin_key_required"
            )

    router = APIRouter(prefix="/v1", tags=["server"], redirect_slashes=False,
                       dependencies=[Depends(check_admin)])  # fmt: skip
    routes = AdapterRoutes(engine)
    for path, handler in (
        ("/load_lora_adapter", routes.load),
        ("/unload_lora_adapter", routes.unload),
    ):
        router.add_api_route(path, handler, methods=["POST"], response_class=PlainTextResponse)
    return router


class AdapterRoutes:
    """The handlers of these routes. Their docstrings are the descriptions in the OpenAPI schema."""

    def __init__(self, engine: EngineClient) -> None:
        self._client = engine

    async def load(self, body: LoadAdapterRequest) -> Response:
        """Load a LoRA adapter, which is then a model of its own name."""
        engine = self._client.one_engine
        if engine is None:
            raise ApiError(400, "this server takes no adapters", param="lora_path")
        await _wait(engine.load_adapter(body.lora_name, body.lora_path), 400, "lora_path")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, body: UnloadAdapterRequest) -> Response:
        """Unload a LoRA adapter; completions that run with it go on to their end."""
        engine = self._client.one_engine
        if engine is None:
            raise ApiError(404, "this server takes no adapters", param="lora_name")
        await _wait(engine.unload_adapter(body.lora_name), 404, "lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _wait(future: Future[Any], status: int, param: str) -> None:
    """Until the engine has done it. Raises ApiError, of this status where it is refused."""
    try:
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), MAX_SECONDS)
    except AdapterError as error:
        raise ApiError(status, f"{param}: {error}", param=param) from error
    except EngineError as error:
        raise ApiError(503, str(error), code="engine_failed") from error
    except asyncio.TimeoutError as error:
        message = f"the engine has not answered within {MAX_SECONDS:g} s"
        raise ApiError(503, message, code="timeout") from error
