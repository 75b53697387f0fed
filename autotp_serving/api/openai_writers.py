"""Turns outputs into OpenAI's replies: whole, or as server-sent events. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autotp_serving.api.answers import AnswerParser, join
from autotp_serving.api.errors import ApiError, check_reason, error_body
from autotp_serving.api.streams import Usage
from autotp_serving.request import Request, RequestOutput

DONE = b"data: [DONE]\n\n"


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI reports it: each prompt counted once, however many answers it got."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        # Answers after the first find their prompt in the cache: no more than the prompt counts.
        "prompt_tokens_details": {
            "cached_tokens": min(usage.num_cached_tokens, usage.num_prompt_tokens)
        },
    }


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event. ASCII escapes: some clients split lines at U+2028 too."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


class ChoiceWriter:
    """Writes the answers of one HTTP request, in the order of `requests`.

    Args:
        head: fields that start the reply and every event: id, created, model, fingerprint.
        usage: of the HTTP request; grows while its outputs come.
        include_usage: end a stream with the usage.
    """

    object_name = ""
    chunk_name = ""

    def __init__(
        self,
        head: Mapping[str, Any],
        requests: Sequence[Request],
        usage: Usage,
        include_usage: bool,
    ) -> None:
        self._head = head
        self._choices = {request.request_id: index for index, request in enumerate(requests)}
        self._usage = usage
        self._include_usage = include_usage
        self._texts: list[list[str]] = [[] for _ in requests]
        self._reasons: list[str | None] = [None for _ in requests]

    def collect(self, outputs: Sequence[RequestOutput]) -> None:
        """Keep outputs for the whole reply. Raises ApiError when one of them has failed."""
        for output in outputs:
            check_reason(output)
            index = self._choices[output.request_id]
            self._texts[index].append(output.text)
            self._reasons[index] = output.finish_reason

    def reply(self) -> dict[str, Any]:
        """The whole reply."""
        choices = [
            self.choice(index, "".join(texts), reason)
            for index, (texts, reason) in enumerate(zip(self._texts, self._reasons, strict=True))
        ]
        return self._head | {
            "object": self.object_name,
            "choices": choices,
            "usage": usage_object(self._usage),
        }

    def events(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The events of some outputs."""
        parts = []
        for output in outputs:
            try:
                check_reason(output)
            except ApiError as error:
                parts.append(event(error_body(error.status, error.message, code=error.code)))
                continue
            index = self._choices[output.request_id]
            parts.extend(
                self._chunk([choice])
                for choice in self.deltas(index, output.text, output.finish_reason)
            )
        return b"".join(parts)

    def end(self) -> bytes:
        """What ends a stream."""
        if not self._include_usage:
            return DONE
        return self._chunk([], usage_object(self._usage)) + DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = self._head | {"object": self.chunk_name, "choices": choices}
        return event(chunk | {"usage": usage} if self._include_usage else chunk)

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """One answer of the whole reply."""
        raise NotImplementedError

    def deltas(self, index: int, text: str, reason: str | None) -> list[dict[str, Any]]:
        """What one output adds to an answer, an event for each."""
        raise NotImplementedError


class CompletionWriter(ChoiceWriter):
    """/v1/completions. `echoes` holds a text to put before each answer, "" for none."""

    object_name = chunk_name = "text_completion"

    def __init__(self, *args: Any, echoes: Sequence[str]) -> None:
        super().__init__(*args)
        self._echoes = list(echoes)

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        text = self._echoes[index] + text
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def deltas(self, index: int, text: str, reason: str | None) -> list[dict[str, Any]]:
        choice = self.choice(index, text, reason)
        self._echoes[index] = ""
        return [choice]


class ChatWriter(ChoiceWriter):
    """/v1/chat/completions. `parsers` holds one for each answer that has parts, else None."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, *args: Any, parsers: Sequence[AnswerParser | None]) -> None:
        super().__init__(*args)
        self._begun: set[int] = set()
        self._parsers = parsers

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if (parser := self._parsers[index]) is not None:
            message |= join(parser.add(text, is_last=True))
            reason = called(parser, reason)
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def deltas(self, index: int, text: str, reason: str | None) -> list[dict[str, Any]]:
        deltas: list[tuple[dict[str, Any], str | None]] = []
        if index not in self._begun:
            self._begun.add(index)
            deltas.append(({"role": "assistant", "content": ""}, None))
        parser = self._parsers[index]
        parts = [{"content": text}] if text or reason is None else []
        if parser is not None:
            is_last = reason is not None
            # Something for each token, so that clients see that it goes on.
            parts = parser.add(text, is_last=is_last) or ([] if is_last else [{"content": ""}])
            reason = called(parser, reason)
        deltas += [(part, None) for part in parts]
        if reason is not None:
            deltas.append(({}, reason))
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            for delta, reason in deltas
        ]


def called(parser: AnswerParser, reason: str | None) -> str | None:
    """The reason as clients of tools want it: an answer that calls one ends for that."""
    return "tool_calls" if reason == "stop" and parser.has_calls else reason
