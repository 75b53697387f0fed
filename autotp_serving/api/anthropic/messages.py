"""Anthropic's messages, made of blocks, as a chat's messages. Rank 0 only.

A turn of the user may hold results of tools, each of which is a message of its own in a chat.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autotp_serving.api.anthropic.schemas import AnthropicMessage, CountTokensRequest, ResultBlock
from autotp_serving.request import RequestError

SERVER_BLOCKS = frozenset({"redacted_thinking"})
"""Of no use to another model: left out."""


def to_messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    """The conversation as a chat's body has it.

    Raises:
        RequestError: naming a block that a model of text cannot be told of.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _read_text(body.system, "system")})
    for number, message in enumerate(body.messages):
        field = f"messages.{number}.content"
        if message.role == "assistant":
            messages.append(_read_assistant(message, field))
        else:
            messages += _read_other(message, field)
    return messages


def ends_in_prefill(body: CountTokensRequest) -> bool:
    """True where the conversation ends in text of the assistant, which is to be continued.

    Raises:
        RequestError: it ends in a call, which only its result can follow.
    """
    last = body.messages[-1]
    if last.role != "assistant":
        return False
    blocks = [] if isinstance(last.content, str) else last.content
    if any(block.type == "tool_use" for block in blocks):
        raise RequestError("messages", "the last one calls a tool: its result has to follow")
    return True


def _read_assistant(message: AnthropicMessage, field: str) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    texts: list[str] = []
    reasoning_parts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        place = f"{field}.{number}"
        if block.type == "thinking":
            reasoning_parts.append(block.thinking or "")
        elif block.type == "tool_use":
            function = {
                "name": _need(block.name, f"{place}.name"),
                "arguments": json.dumps(block.input or {}, ensure_ascii=False),
            }
            call_id = _need(block.id, f"{place}.id")
            calls.append({"id": call_id, "type": "function", "function": function})
        elif block.type not in SERVER_BLOCKS:
            texts.append(_read_text([block], field, number))
    read: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(filter(None, texts))}
    if any(reasoning_parts):
        read["reasoning_content"] = "\n\n".join(filter(None, reasoning_parts))
    if calls:
        read["tool_calls"] = calls
    return read


def _read_other(message: AnthropicMessage, field: str) -> list[dict[str, Any]]:
    """A turn of the user or of the system; results of tools come first, as they answer calls."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for number, block in enumerate(message.content):
        if block.type != "tool_result":
            texts.append(_read_text([block], field, number))
            continue
        place = f"{field}.{number}"
        text = _read_text(block.content or "", f"{place}.content")
        if block.is_error:
            text = f"Error: {text}"
        call_id = _need(block.tool_use_id, f"{place}.tool_use_id")
        results.append({"role": "tool", "tool_call_id": call_id, "content": text})
    if texts or not results:
        results.append({"role": message.role, "content": "\n".join(texts)})
    return results


def _read_text(content: str | Sequence[ResultBlock], field: str, first: int = 0) -> str:
    """Text, or that of blocks, joined by lines; `first` is the first one's number in its list."""
    if isinstance(content, str):
        return content
    for number, block in enumerate(content, first):
        if block.type != "text":
            raise RequestError(
                f"{field}.{number}.type",
                f"'{block.type[:40]}': the model reads text only, no images, documents or results "
                "of tools that a server runs",
            )
    return "\n".join(block.text or "" for block in content)


def _need(value: str | None, field: str) -> str:
    if not value:
        raise RequestError(field, "is missing")
    return value
