"""What tests of the dialects beside OpenAI's chat share: a model that calls, and their streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.api import service

ARGUMENTS = '{"city": "Berlin"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CONFIG = {"tool_call_parser": "hermes", "reasoning_parser": "think"}
BOOK = {
    "user: think\nassistant: ": "<think>\nHm.\n</think>\n\nYes.",
    "tool get_weather\nuser: weather?\nassistant: ": f"<think>Hm.</think>Let me see.\n{CALL}",
    "tool get_weather\nuser: weather?\nassistant: Let me see.\ntool: sunny\nassistant: ": "Sunny.",
    "tool group.get_weather\nuser: weather?\nassistant: ": CALL.replace('"get', '"group.get'),
    "system: Be brief.\n\nBe kind.\nuser: What is AI?\nassistant: ": "Science.",
}


def post(path: str, *bodies: dict[str, Any], **options: Any) -> list[httpx.Response]:
    """Replies to bodies sent one after the other to one service."""
    headers = options.pop("headers", {})
    options["config"] = CONFIG | options.get("config", {})

    async def go() -> list[httpx.Response]:
        async with service.client(book=BOOK, **options) as (http, _):
            return [await http.post(path, json=body, headers=headers) for body in bodies]

    return asyncio.run(go())


def read_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each says its type twice."""
    events = []
    for part in filter(None, text.split("\n\n")):
        kind, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert events[-1]["type"] == kind.removeprefix("event: ")
    return events
