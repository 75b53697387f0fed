"""The three ways to ask for text, native, completions and chat: bodies out, token times in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.http_client import Piece, Response

REASON_KEYS = ("error", "message", "detail")
MAX_REASON = 160


@dataclass(frozen=True)
class Prompt:
    """One request to make; `answer` is what a dataset answers."""

    text: str
    max_new_tokens: int
    num_tokens: int | None = None
    answer: str | None = None


@dataclass
class Reply:
    """What came back of one request; times in seconds of `time.perf_counter()`.

    Attributes:
        token_times: arrival of each event that carried text (or a token without text, where the
            API has such events); several tokens may share an event.
        num_output_tokens: as the server counts them; None where it does not say.
        failure: the kind of failure, None for a request that was answered to its end.
    """

    started: float
    finished: float = 0.0
    token_times: list[float] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    failure: str | None = None
    text: str = ""


@dataclass(frozen=True)
class Api:
    """One API: where it is, what its body is, how its stream is read."""

    path: str
    make_body: Callable[[Prompt, str | None], dict[str, Any]]
    read: Callable[[Sequence[Piece], Reply], None]
    token_mark: bytes  # occurs once per event: counts tokens for the live display


def read_response(api: Api, response: Response, reply: Reply) -> None:
    """Fill in a reply from the response of a streamed request."""
    reply.finished = response.finished
    if not 200 <= response.status < 300:
        reply.failure = describe_refusal(response)
        return
    try:
        api.read(response.pieces, reply)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reply.failure = f"the stream cannot be read ({type(error).__name__})"
        return
    if reply.failure is None and reply.finish_reason is None:
        reply.failure = "the stream ended early"


def describe_refusal(response: Response) -> str:
    """The status and the reason that the body gives, short enough to count by."""
    try:
        answer = json.loads(response.body)
    except ValueError:
        answer = None
    reason = answer
    while isinstance(reason, dict):
        reason = next((reason[key] for key in REASON_KEYS if key in reason), None)
    text = f"HTTP {response.status}"
    return f"{text}: {' '.join(reason.split())[:MAX_REASON]}" if isinstance(reason, str) else text


def timed_lines(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Cut a body into lines; a line has arrived when its last byte has."""
    rest = b""
    for time, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield time, line
    if rest.strip():
        yield pieces[-1][0], rest


def _native_body(prompt: Prompt, model: str | None) -> dict[str, Any]:
    return {"prompt": prompt.text, "n_predict": prompt.max_new_tokens}


def _read_native(pieces: Sequence[Piece], reply: Reply) -> None:
    """A JSON line per token, then one whose finish_reason is set."""
    texts = []
    for time, line in timed_lines(pieces):
        event = json.loads(line)
        if event["finish_reason"] is None:
            reply.token_times.append(time)
            texts.append(event["message"]["content"] or "")
        else:
            reply.finish_reason = event["finish_reason"]
            if event.get("error") or reply.finish_reason not in ("stop", "length"):
                reply.failure = f"error in the stream: {event.get('error', reply.finish_reason)}"
    reply.num_output_tokens = len(reply.token_times)
    reply.text = "".join(texts)


def _completions_body(prompt: Prompt, model: str | None) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt.text,
        "max_tokens": prompt.max_new_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _chat_body(prompt: Prompt, model: str | None) -> dict[str, Any]:
    body = _completions_body(prompt, model)
    del body["prompt"]
    return body | {"messages": [{"role": "user", "content": prompt.text}]}


def _read_sse(pieces: Sequence[Piece], reply: Reply) -> None:
    """OpenAI's events: pieces of text, a finish_reason, usage, and [DONE] at the end."""
    texts = []
    is_done = False
    for time, line in timed_lines(pieces):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            is_done = True
            continue
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            message = error.get("message") if isinstance(error, dict) else error
            reply.failure = f"error in the stream: {message}"
            continue
        if event.get("usage"):
            reply.num_prompt_tokens = event["usage"]["prompt_tokens"]
            reply.num_output_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            delta = choice.get("delta")
            if delta is None:
                text = choice.get("text")
            else:
                text = (delta.get("content") or "") + (delta.get("reasoning_content") or "")
            if text:
                reply.token_times.append(time)
                texts.append(text)
            reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    if reply.finish_reason == "error":
        reply.failure = reply.failure or "error in the stream"
    if not is_done:
        reply.finish_reason = None
    reply.text = "".join(texts)


APIS = {
    "native": Api("/generate_stream/", _native_body, _read_native, b"\n"),
    "completions": Api("/v1/completions", _completions_body, _read_sse, b"data:"),
    "chat": Api("/v1/chat/completions", _chat_body, _read_sse, b"data:"),
}
