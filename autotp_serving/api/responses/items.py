"""The items of a conversation as a chat's messages. Rank 0 only.

A turn of the model comes as several items, reasoning, text and calls, and is one message of a chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from autotp_serving.api.responses.schemas import InputItem, InputPart, ResponsesRequest
from autotp_serving.api.responses.tools import chat_name
from autotp_serving.request import RequestError

TEXT_TYPES = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})
SYSTEM_ROLES = ("system", "developer")


def to_messages(
    body: ResponsesRequest,
    find: Callable[[str], InputItem | None],
    earlier: Sequence[InputItem] = (),
) -> list[dict[str, Any]]:
    """The conversation as a chat's body has it.

    Args:
        body: of the request.
        find: an item of an earlier response by its id.
        earlier: items of the conversation that the request goes on with.

    Raises:
        RequestError: naming an item that a model of text cannot be told of.
    """
    conversation = _Conversation()
    if body.instructions:
        conversation.add_text("system", body.instructions)
    fields = ["previous_response_id"] * len(earlier)
    is_text = isinstance(body.input, str)
    fields += [f"input.{number}" for number in range(len(body.input))] if not is_text else ["input"]
    for item, field in zip((*earlier, *input_items(body)), fields, strict=True):
        if item.type == "item_reference":
            item = _recall(item, field, find)
        conversation.add(item, field)
    if not conversation.messages:
        raise RequestError("input", "must not be empty")
    return conversation.messages


def input_items(body: ResponsesRequest) -> list[InputItem]:
    """What a request brings of the conversation."""
    if isinstance(body.input, str):
        return [InputItem(role="user", content=body.input)]
    return body.input


class _Conversation:
    """Grows by items."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def add(self, item: InputItem, field: str) -> None:
        kind = item.type or "message"
        if kind == "message":
            if item.role is None:
                raise RequestError(f"{field}.role", "is missing")
            self.add_text(item.role, _read_text(item.content, f"{field}.content"))
        elif kind in ("function_call", "custom_tool_call"):
            self._add_call(item, field)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = _read_text(item.output, f"{field}.output")
            call_id = _need(item.call_id, f"{field}.call_id")
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        elif kind == "reasoning":
            parts = item.content or item.summary
            self._grow(self._turn(), "reasoning_content", _read_text(parts, f"{field}.content"))
        else:
            raise RequestError(f"{field}.type", f"'{kind[:40]}' is no item that there is here")

    def add_text(self, role: str, text: str) -> None:
        """A message; one of the assistant continues its turn, leading ones of the system join."""
        if role == "assistant":
            self._grow(self._turn(), "content", text)
            return
        role = "system" if role in SYSTEM_ROLES else role
        if role == "system" and len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self._grow(self.messages[0], "content", text)  # most templates know one, at the start
            return
        self.messages.append({"role": role, "content": text})

    def _add_call(self, item: InputItem, field: str) -> None:
        name = _need(item.name, f"{field}.name")
        arguments = item.arguments or "{}"
        if item.type == "custom_tool_call":
            arguments = json.dumps({"input": item.input or ""}, ensure_ascii=False)
        function = {"name": chat_name(name, item.namespace), "arguments": arguments}
        call_id = _need(item.call_id, f"{field}.call_id")
        call = {"id": call_id, "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def _turn(self) -> dict[str, Any]:
        """The message of the model's turn that goes on."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]

    @staticmethod
    def _grow(message: dict[str, Any], name: str, text: str) -> None:
        before = message.get(name)
        if text:
            message[name] = f"{before}\n\n{text}" if before else text


def _read_text(content: str | list[InputPart] | None, field: str) -> str:
    """The text of an item, its parts joined by lines."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*TEXT_TYPES, "refusal"):
            raise RequestError(
                f"{field}.{number}.type",
                f"'{part.type[:40]}': the model reads text only, no images, sounds or files",
            )
        texts.append(text or "")
    return "\n".join(texts)


def _recall(reference: InputItem, field: str, find: Callable[[str], InputItem | None]) -> InputItem:
    item = find(_need(reference.id, f"{field}.id"))
    if item is None:
        raise RequestError(
            field,
            "refers to an item that is not remembered, as only the latest are: send the item "
            "itself, as clients do with store: false",
        )
    return item


def _need(value: str | None, field: str) -> str:
    if not value:
        raise RequestError(field, "is missing")
    return value
