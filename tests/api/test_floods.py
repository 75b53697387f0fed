"""Bodies that are wrong, or right, in a great many places: refused at once, for one reason."""

from __future__ import annotations

import asyncio
import socket
from itertools import repeat
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from autotp_serving.api.http_protocol import MAX_HEAD_BYTES
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.schemas import CompletionRequest
from autotp_serving.api.tokenize_routes import DetokenizeRequest, TokenizeRequest
from autotp_serving.engine.grammar import GrammarError
from autotp_serving.engine.grammar_compiler import MAX_SOURCE_LEN, GrammarCompiler
from autotp_serving.structured_output import CallableTool, StructuredOutput, ToolCalls
from tests.api import service
from tests.api.conftest import LiveServer
from tests.fakes import ByteTokenizer

MANY = 20_000
ASK = {"messages": [{"role": "user", "content": "What is AI?"}]}
NUMBERS = {str(number): 1 for number in range(MANY)}
MAX_ERRORS = 4  # of the members of a union, one each


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": [1] * 10_000}),
        (ChatRequest, {"messages": ASK["messages"] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a", "tool_calls": [{}] * MANY}]}),
        (ChatRequest, ASK | {f"field{number}": 1 for number in range(MANY)}),
        (ChatRequest, ASK | {"metadata": NUMBERS}),
        (ChatRequest, ASK | {"chat_template_kwargs": NUMBERS}),
        (ChatRequest, ASK | {"logit_bias": dict.fromkeys(NUMBERS, "x")}),
        (ChatRequest, ASK | {"guided_json": dict.fromkeys(NUMBERS, "\ud800")}),
        (CompletionRequest, {"prompt": ["a"] * MANY}),
        (TokenizeRequest, {"messages": [1] * 10_000}),
        (DetokenizeRequest, {"tokens": ["a"] * MANY}),
    ],
)  # fmt: skip
def test_mistakes_are_not_listed_by_the_thousand(
    model: type[BaseModel], body: dict[str, Any]
) -> None:
    """15 million of them once took two minutes and 11 GB, in which nobody else was served."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= MAX_ERRORS


def post(path: str, body: bytes) -> Any:
    async def go() -> Any:
        async with service.client() as (http, _):
            return await http.post(path, content=body)

    return asyncio.run(go())


def test_the_first_of_many_unknown_fields_is_named() -> None:
    fields = ", ".join(f'"field{number}": 1' for number in range(MANY))
    reply = post("/v1/completions", f'{{"prompt": "a", {fields}}}'.encode())
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "field0")


@pytest.mark.parametrize("is_tool", [False, True])
def test_a_structure_too_long_to_compile_is_not_kept(is_tool: bool) -> None:
    text = "a" * (MAX_SOURCE_LEN + 1)
    structured_output = StructuredOutput("regex", text)
    if is_tool:
        tool = CallableTool("f", text, is_strict=True)
        structured_output = StructuredOutput("text", calls=ToolCalls("hermes", (tool,)))
    compiler = GrammarCompiler(ByteTokenizer())
    with pytest.raises(GrammarError, match="longer than"):
        compiler.submit(structured_output).result()
    assert not compiler._cache


def send(live: LiveServer, *pieces: bytes) -> bytes:
    """What the server answers to these bytes before it closes the connection."""
    host, _, port = live.url.rpartition("//")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        answer = b""
        try:
            for piece in pieces:
                client.sendall(piece)
            while part := client.recv(2**16):
                answer += part
        except ConnectionError:  # closed while we were still sending
            return answer or b"reset"
        return answer


@pytest.mark.live
@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"a" * 2**16),
        (b"GET /health HTTP/1.1\r\nX: ", b"a" * 2**16),
        (b"GET /health HTTP/1.1\r\n", b"X: a\r\n" * 10_000),
        (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a" * 2**16),
        (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
         b"X: a\r\n" * 10_000),
    ],
)  # fmt: skip
def test_a_head_without_end_is_refused(live: LiveServer, start: bytes, more: bytes) -> None:
    """Address, header, headers, chunk extension, trailers."""
    answer = send(live, start, *repeat(more, 16 * MAX_HEAD_BYTES // len(more)))
    assert answer in (b"", b"reset") or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.live
def test_many_requests_on_one_connection_are_no_flood(live: LiveServer) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 30_000 + b"\r\n"
    answer = send(live, (one + b"\r\n") * 40, one + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 41
    body = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    assert send(live, head % len(body), body).startswith(b"HTTP/1.1 200")
