"""Turns outputs into one of Anthropic's messages: whole, or as its events. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autotp_serving.api.anthropic.error_shape import anthropic_error
from autotp_serving.api.engine_client import Usage
from autotp_serving.api.errors import ApiError
from autotp_serving.api.openai.completion_parser import CompletionParser
from autotp_serving.api.openai.completion_parts import Part, PartChange, PartReader
from autotp_serving.request import RequestOutput

SIGNATURE = "unsigned"
"""Clients send reasoning back only with one; nobody checks it here."""

DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


class MessageWriter:
    """Writes one message.

    Args:
        head: its `id` and its `model`.
        usage: of the HTTP request; grows while its outputs come.
        parser: of the completion.
        is_cut: less is generated than was asked for, as no more fits the model.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        usage: Usage,
        parser: CompletionParser | None,
        *,
        is_cut: bool,
    ) -> None:
        self._head = {
            "id": head["id"],
            "type": "message",
            "role": "assistant",
            "model": head["model"],
        }
        self._usage = usage
        self._reader = PartReader(parser)
        self._is_cut = is_cut
        self._error: ApiError | None = None

    def collect(self, outputs: Sequence[RequestOutput]) -> None:
        """See Writer."""
        self._reader.add(outputs)

    def reply(self) -> dict[str, Any]:
        """See Writer."""
        content = [_block(part) for part in self._reader.parts]
        return self._head | {"content": content} | self._stop() | {"usage": self._usage_object()}

    def begin(self) -> bytes:
        """See Writer."""
        message = self._head | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage_object(),
        }
        return _event("message_start", message=message) + _event("ping")

    def events(self, outputs: Sequence[RequestOutput]) -> bytes:
        """See Writer."""
        try:
            changes = self._reader.add(outputs)
        except ApiError as error:
            self._error = error
            return b""
        return b"".join(map(_change_event, changes))

    def end(self) -> bytes:
        """See Writer."""
        if self._error is not None:
            return _write("error", anthropic_error(self._error.status, self._error.message))
        delta = _event("message_delta", delta=self._stop(), usage=self._usage_object())
        return delta + _event("message_stop")

    def _stop(self) -> dict[str, Any]:
        """Why the message ends."""
        last = self._reader.last_output
        stop_string = None if last is None else last.stop_string
        if self._reader.reason == "length":
            reason = "model_context_window_exceeded" if self._is_cut else "max_tokens"
        elif stop_string is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._reader.has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop_string}

    def _usage_object(self) -> dict[str, Any]:
        """Tokens of the prompt that were in the cache are counted apart, as Anthropic does."""
        num_cached = min(self._usage.num_cached_tokens, self._usage.num_prompt_tokens)
        return {
            "input_tokens": self._usage.num_prompt_tokens - num_cached,
            "cache_read_input_tokens": num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self._usage.num_output_tokens,
        }


def _block(part: Part, *, is_empty: bool = False) -> dict[str, Any]:
    """One block of the content; as it begins, without text."""
    text = "" if is_empty else part.text
    if part.kind == "text":
        return {"type": "text", "text": text}
    if part.kind == "reasoning":
        return {
            "type": "thinking",
            "thinking": text,
            "signature": "" if is_empty else SIGNATURE,
        }
    tool_id = "toolu_" + part.call_id.removeprefix("call_")
    return {"type": "tool_use", "id": tool_id, "name": part.name, "input": _read_input(text)}


def _read_input(arguments: str) -> dict[str, Any]:
    """A call's arguments; of one that was cut short nothing can be told."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _change_event(change: PartChange) -> bytes:
    part = change.part
    if change.step == "begin":
        block = _block(part, is_empty=True)
        return _event("content_block_start", index=part.index, content_block=block)
    if change.step == "grow":
        kind, field = DELTAS[part.kind]
        delta = {"type": kind, field: change.text}
        return _event("content_block_delta", index=part.index, delta=delta)
    signed = b""
    if part.kind == "reasoning":
        delta = {"type": "signature_delta", "signature": SIGNATURE}
        signed = _event("content_block_delta", index=part.index, delta=delta)
    return signed + _event("content_block_stop", index=part.index)


def _event(kind: str, **fields: Any) -> bytes:
    return _write(kind, {"type": kind, **fields})


def _write(kind: str, data: Mapping[str, Any]) -> bytes:
    """One event. ASCII escapes: some clients split lines at U+2028 too."""
    text = json.dumps(data, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n".encode("ascii")
