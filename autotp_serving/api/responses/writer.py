"""Turns outputs into a response: whole, or as its events. Rank 0 only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autotp_serving.api.engine_client import Usage
from autotp_serving.api.errors import ApiError
from autotp_serving.api.logprobs import ListedLogprobs
from autotp_serving.api.openai.completion_parser import CompletionParser
from autotp_serving.api.openai.completion_parts import Part, PartChange, PartReader
from autotp_serving.api.responses.tools import CallableName, read_arguments
from autotp_serving.request import RequestOutput, TokenLogprobs

PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponsesWriter:
    """Writes one response.

    Args:
        head: its fields that are known before there is any output, `id` among them.
        usage: of the HTTP request; grows while its outputs come.
        parser: of the completion.
        names: what the client calls its tools, by the name that the model knows.
        logprobs: writes those of the text.
        shows_summary: reasoning comes as a summary, not as content.
        keep: takes a response that has ended.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        usage: Usage,
        parser: CompletionParser | None,
        names: Mapping[str, CallableName],
        logprobs: ListedLogprobs,
        *,
        shows_summary: bool,
        keep: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._head = dict(head)
        self._usage = usage
        self._reader = PartReader(parser)
        self._names = names
        self._logprobs = logprobs
        self._shows_summary = shows_summary
        self._keep = keep
        self._id_base = str(head["id"]).partition("_")[2]
        self._num_events = 0
        self._error: ApiError | None = None

    def collect(self, outputs: Sequence[RequestOutput]) -> None:
        """See Writer."""
        self._reader.add(outputs)

    def reply(self) -> dict[str, Any]:
        """See Writer."""
        is_incomplete = self._reader.reason == "length"
        output = [self._item(part, self._status_of(part)) for part in self._reader.parts]
        response = self._head | {
            "status": "incomplete" if is_incomplete else "completed",
            "completed_at": None if is_incomplete else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_incomplete else None,
            "output": output,
            "usage": self._usage_object(),
        }
        self._keep(response)
        return response

    def begin(self) -> bytes:
        """See Writer."""
        started = self._head | {"status": "in_progress"}
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=started) for kind in kinds)

    def events(self, outputs: Sequence[RequestOutput]) -> bytes:
        """See Writer."""
        try:
            changes = self._reader.add(outputs)
        except ApiError as error:
            self._error = error
            return b""
        return b"".join(self._change_events(change) for change in changes)

    def end(self) -> bytes:
        """See Writer."""
        if self._error is None:
            response = self.reply()
            return self._event(f"response.{response['status']}", response=response)
        # The codes of OpenAI's own; ours, and the reason, are in the message.
        code = "server_error" if self._error.status >= 500 else "invalid_prompt"
        message = f"{self._error.message} ({self._error.code})"
        failed = {"status": "failed", "error": {"code": code, "message": message}}
        return self._event("response.failed", response=self._head | failed)

    def _change_events(self, change: PartChange) -> bytes:
        part = change.part
        place = {"output_index": part.index}
        within = {"item_id": self._item_id(part), **place}
        if change.step == "begin":
            item = self._item(part, "in_progress", is_empty=True)
            added = self._event("response.output_item.added", **place, item=item)
            return added + self._begin_content(part, within)
        if change.step == "grow":
            return self._grow_content(part, within, change)
        ended = self._end_content(part, within)
        item = self._item(part, self._status_of(part))
        return ended + self._event("response.output_item.done", **place, item=item)

    def _begin_content(self, part: Part, within: dict[str, Any]) -> bytes:
        if part.kind == "call":
            return b""
        name, index, content = self._content(part, is_empty=True)
        return self._event(f"response.{name}.added", **within, **index, part=content)

    def _grow_content(self, part: Part, within: dict[str, Any], change: PartChange) -> bytes:
        text = change.text
        if part.kind != "call":
            _, index, _ = self._content(part, is_empty=True)
            return self._event(
                f"response.{self._text_name(part)}.delta", **within, **index, delta=text,
                **self._write_logprobs(part, change.logprobs),
            )  # fmt: skip
        if self._find_name(part).is_custom:  # its text is known once all of it has come
            return b""
        return self._event("response.function_call_arguments.delta", **within, delta=text)

    def _end_content(self, part: Part, within: dict[str, Any]) -> bytes:
        text = part.text
        if part.kind != "call":
            name, index, content = self._content(part)
            return self._event(
                f"response.{self._text_name(part)}.done", **within, **index, text=text,
                **self._write_logprobs(part, part.logprobs),
            ) + self._event(f"response.{name}.done", **within, **index, part=content)  # fmt: skip
        called = self._find_name(part)
        if not called.is_custom:
            kind = "response.function_call_arguments.done"
            return self._event(kind, **within, name=called.name, arguments=text)
        kind = "response.custom_tool_call_input"
        value = read_arguments(text, is_custom=True)
        delta = self._event(f"{kind}.delta", **within, delta=value)
        return delta + self._event(f"{kind}.done", **within, input=value)

    def _content(
        self, part: Part, *, is_empty: bool = False
    ) -> tuple[str, dict[str, int], dict[str, Any]]:
        """What events call the content of a text or of reasoning, its number, and itself."""
        text = "" if is_empty else part.text
        if part.kind == "text":
            content = {"type": "output_text", "text": text, "annotations": []}
            content |= self._write_logprobs(part, () if is_empty else part.logprobs)
            return "content_part", {"content_index": 0}, content
        if self._shows_summary:
            content = {"type": "summary_text", "text": text}
            return "reasoning_summary_part", {"summary_index": 0}, content
        return "content_part", {"content_index": 0}, {"type": "reasoning_text", "text": text}

    def _text_name(self, part: Part) -> str:
        if part.kind == "text":
            return "output_text"
        return "reasoning_summary_text" if self._shows_summary else "reasoning_text"

    def _write_logprobs(self, part: Part, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {"logprobs": self._logprobs.write(logprobs)} if part.kind == "text" else {}

    def _item(self, part: Part, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        """One item of the output; as it begins, without content."""
        item: dict[str, Any] = {"id": self._item_id(part), "status": status}
        text = "" if is_empty else part.text
        contents = [] if is_empty or part.kind == "call" else [self._content(part)[2]]
        if part.kind == "text":
            return item | {"type": "message", "role": "assistant", "content": contents}
        if part.kind == "reasoning":
            shown = {"summary": contents} if self._shows_summary else {"content": contents}
            return item | {"type": "reasoning", "summary": [], "encrypted_content": None} | shown
        called = self._find_name(part)
        value = text and read_arguments(text, is_custom=called.is_custom)
        kind, field = ("custom_tool_call", "input") if called.is_custom else (
            "function_call", "arguments",
        )  # fmt: skip
        item |= {"type": kind, "call_id": part.call_id, "name": called.name, field: value}
        return item | ({"namespace": called.namespace} if called.namespace else {})

    def _status_of(self, part: Part) -> str:
        """Of a part that has ended: the last one may have been cut short."""
        is_cut = self._reader.reason == "length" and part is self._reader.parts[-1]
        return "incomplete" if is_cut else "completed"

    def _item_id(self, part: Part) -> str:
        return f"{PREFIXES[part.kind]}_{self._id_base}_{part.index}"

    def _find_name(self, part: Part) -> CallableName:
        return self._names.get(part.name) or CallableName(part.name)

    def _usage_object(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One event. ASCII escapes: some clients split lines at U+2028 too."""
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        text = json.dumps(data, separators=(",", ":"))
        return f"event: {kind}\ndata: {text}\n\n".encode("ascii")
