"""The latest responses as a whole, with --responses-store: to read, and to go on from. Rank 0 only.

A response knows the one that it went on from by its id, so that a long conversation is kept once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from autotp_serving.api.errors import ApiError
from autotp_serving.api.responses.item_memory import BoundedMemory
from autotp_serving.api.responses.schemas import MAX_ITEMS, InputItem
from autotp_serving.request import RequestError

MAX_RESPONSES = 2**10
MAX_CHARS = 2**26
"""Of all responses that are kept, and of what they answered."""


@dataclass(frozen=True)
class StoredResponse:
    """One of them.

    Attributes:
        response: as it was given.
        asked: the items that it answered, without those of earlier responses.
        answered: its own items.
    """

    response: Mapping[str, Any]
    asked: Sequence[InputItem]
    answered: Sequence[InputItem]


class ResponseStore:
    """Keeps responses, each for the key that asked for it. Its docstrings go to the OpenAPI schema.

    Args:
        max_responses: so many at most.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES) -> None:
        self._memory = BoundedMemory[StoredResponse](max_responses, MAX_CHARS)

    def add_routes(self, router: APIRouter) -> None:
        """To read and to delete what is kept."""
        router.add_api_route("/responses/{response_id}", self.read, methods=["GET"])
        router.add_api_route("/responses/{response_id}", self.delete, methods=["DELETE"])

    async def read(self, response_id: str, request: Request) -> dict[str, Any]:
        """A response that is kept."""
        for name in request.query_params:
            raise RequestError(name[:40], "is not a parameter of this route: leave it out")
        stored = self._memory.find(request.state.record.tenant, response_id)
        if stored is None:
            raise _not_found(response_id)
        return dict(stored.response)

    async def delete(self, response_id: str, request: Request) -> dict[str, Any]:
        """Forget a response; its items may still be referred to for a while."""
        if not self._memory.forget(request.state.record.tenant, response_id):
            raise _not_found(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    def keep(self, tenant: str, asked: Sequence[InputItem], response: Mapping[str, Any]) -> None:
        """Remember a response that has ended.

        Args:
            tenant: who asked for it.
            asked: what it answers, beside earlier responses.
            response: the whole of it.
        """
        answered = [InputItem.model_validate(item) for item in response["output"]]
        num_chars = len(json.dumps(response)) * 2 + sum(
            len(item.model_dump_json()) for item in asked
        )
        stored = StoredResponse(response, asked, answered)
        self._memory.keep(tenant, response["id"], stored, num_chars)

    def conversation(self, tenant: str, response_id: str | None) -> list[InputItem]:
        """All items up to the end of a response, those before it first; none for None.

        Raises:
            RequestError: where one of them is not kept, or there are more than a body may hold.
        """
        parts: list[Sequence[InputItem]] = []
        num_items = 0
        while response_id is not None:
            stored = self._memory.find(tenant, response_id)
            if stored is None:
                raise RequestError(
                    "previous_response_id",
                    f"'{response_id[:60]}' is not kept, as only the latest are: send the "
                    "conversation itself",
                )
            parts += [stored.answered, stored.asked]
            num_items += len(stored.answered) + len(stored.asked)
            if num_items > MAX_ITEMS:
                raise RequestError(
                    "previous_response_id",
                    f"goes on with a conversation of over {MAX_ITEMS} items: begin another one",
                )
            response_id = stored.response["previous_response_id"]
        return [item for part in reversed(parts) for item in part]


def _not_found(response_id: str) -> ApiError:
    message = f"Response with id '{response_id[:60]}' not found: only the latest are kept"
    return ApiError(404, message, param="response_id", code="not_found")
