"""Calls of every family through all dialects: the same code reads them."""

from __future__ import annotations

import asyncio
import json
from typing import Any, get_args

import pytest

from autotp_serving.structured_output import ToolFormat
from tests.api import service
from tests.api.dialects import read_events
from tests.api.tool_families import ADD, FAMILIES, TOOLS, WEATHER

PROMPT = "tool weather\ntool add\nuser: go\nassistant: "
MESSAGES = [{"role": "user", "content": "go"}]
BOTH = [("weather", WEATHER), ("add", ADD)]


@pytest.mark.parametrize("tool_format", get_args(ToolFormat))
def test_calls_in_every_dialect(tool_format: ToolFormat) -> None:
    functions = [{"name": name, "parameters": schema} for name, schema in TOOLS.items()]
    chat: dict[str, Any] = {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": one} for one in functions],
        "temperature": 0,
    }
    responses = {
        "input": "go",
        "tools": [{"type": "function", "strict": False, **one} for one in functions],
        "temperature": 0,
    }
    messages = {
        "messages": MESSAGES,
        "tools": [{"name": name, "input_schema": schema} for name, schema in TOOLS.items()],
        "temperature": 0,
        "max_tokens": 1500,
    }

    async def go() -> list[str]:
        config = {"tool_call_parser": tool_format}
        book = {PROMPT: FAMILIES[tool_format].calls}
        async with service.client(config=config, book=book, max_model_len=2048) as (http, _):
            asked = (("chat/completions", chat), ("responses", responses), ("messages", messages))
            return [
                (await http.post(f"/v1/{path}", json=body | {"stream": streams})).text
                for path, body in asked
                for streams in (False, True)
            ]

    texts = asyncio.run(go())
    choice = json.loads(texts[0])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [(one["name"], json.loads(one["arguments"])) for one in calls] == BOTH
    streamed = ["", ""]
    for line in texts[1].split("\n\n")[:-2]:
        for one in json.loads(line[6:])["choices"][0]["delta"].get("tool_calls", ()):
            streamed[one["index"]] += one["function"]["arguments"]
    assert streamed == [one["arguments"] for one in calls]
    items = [json.loads(texts[2])["output"], read_events(texts[3])[-1]["response"]["output"]]
    for output in items:
        calls = [item for item in output if item["type"] == "function_call"]
        assert [(one["name"], json.loads(one["arguments"])) for one in calls] == BOTH
    blocks = [one for one in json.loads(texts[4])["content"] if one["type"] == "tool_use"]
    assert [(one["name"], one["input"]) for one in blocks] == BOTH
    events = read_events(texts[5])
    begun = [one["content_block"] for one in events if one["type"] == "content_block_start"]
    assert [one["name"] for one in begun if one["type"] == "tool_use"] == ["weather", "add"]
