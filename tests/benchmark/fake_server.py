"""A server that streams made-up tokens, well or badly, without any model.

In tests it runs in a thread; alone: `python tests/benchmark/fake_server.py --port 8000`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any

WORD_PIECE = re.compile(r"\s*\S{1,4}|\s+")
BOS = 1
TEMPLATE_TOKENS = 9


class PieceTokenizer:
    """A BOS, then pieces of up to four letters, with the space before them."""

    def __init__(self) -> None:
        self.pieces: list[str] = ["", "<s>"]
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        tokens = [BOS]
        for piece in WORD_PIECE.findall(text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            tokens.append(self.ids[piece])
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces[token] for token in tokens if token != BOS)


class FakeServer:
    """Serves all routes that benchmark.py and wrk use.

    `fault(number)` names what goes wrong with the number-th generation request, counted from 1:
    http500, hangup, cut, stall, error, or None.
    """

    def __init__(
        self,
        *,
        fault: Callable[[int], str | None] = lambda number: None,
        first_delay: float = 0.0,
        token_delay: float = 0.0,
        has_tokenize: bool = True,
        sends_usage: bool = True,
        tokens_per_event: int = 1,
    ) -> None:
        self.fault = fault
        self.first_delay = first_delay
        self.token_delay = token_delay
        self.has_tokenize = has_tokenize
        self.sends_usage = sends_usage
        self.tokens_per_event = tokens_per_event
        self.tokenizer = PieceTokenizer()
        self.bodies: list[dict[str, Any]] = []
        self.num_running = 0
        self.most_running = 0
        self.generated = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve_until_cancelled())
        self._loop.close()

    async def _serve_until_cancelled(self) -> None:
        listener = await self.listen(0)
        self._started.set()
        try:
            await listener.serve_forever()
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)  # connections close

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    async def listen(self, port: int) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = json.loads(await reader.readexactly(int(length[1]))) if length else {}
                if not await self._answer(writer, method, path, body):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, path: str, body: dict[str, Any]
    ) -> bool:
        """Answer one request; False when the connection must end."""
        if path in ("/generate/", "/generate_stream/", "/v1/completions", "/v1/chat/completions"):
            self.bodies.append(body)
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
            try:
                return await self._generate(writer, path, body, self.fault(len(self.bodies)))
            finally:
                self.num_running -= 1
        answer: Any = None
        if path == "/health":
            answer = {"status": "ok"}
        elif path == "/v1/models":
            answer = {"data": [{"id": "fake"}]}
        elif path == "/metrics":
            return await self._send(
                writer, 200, f"# HELP x\nfake:generation_tokens_total {self.generated}\n".encode()
            )
        elif path == "/tokenize" and self.has_tokenize:
            tokens = self.tokenizer.encode(body["prompt"])
            answer = {"tokens": tokens, "count": len(tokens)}
        elif path == "/detokenize" and self.has_tokenize:
            answer = {"prompt": self.tokenizer.decode(body["tokens"])}
        status = 200 if answer is not None else 404
        return await self._send(writer, status, json.dumps(answer or {"error": path}).encode())

    async def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> bool:
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True

    async def _generate(
        self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any], fault: str | None
    ) -> bool:
        if fault == "http500":
            return await self._send(writer, 500, b'{"error": {"message": "out of luck"}}')
        if fault == "hangup":
            return False
        num_tokens = body.get("n_predict") or body["max_tokens"]
        is_native = path.startswith("/generate")
        prompt = body.get("prompt") or body["messages"][0]["content"]
        num_prompt = len(self.tokenizer.encode(prompt)) + TEMPLATE_TOKENS * ("messages" in body)
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
        await asyncio.sleep(self.first_delay)
        if path == "/generate/" or not body.get("stream", is_native):
            self.generated += num_tokens
            message = {"index": 0, "message": {"role": "assistant", "content": " tok" * num_tokens}}
            whole = {"choices": [{"text": " tok" * num_tokens}], "usage": usage}
            return await self._send(
                writer, 200, json.dumps(message if is_native else whole).encode()
            )
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        while sent < num_tokens:
            if sent >= num_tokens // 2 and fault is not None:
                if fault == "stall":
                    await asyncio.sleep(3600)
                if fault == "cut":
                    return False
                if fault == "error":
                    break
            count = min(self.tokens_per_event, num_tokens - sent)
            self._chunk(writer, self._event(path, sent, " tok" * count))
            sent += count
            self.generated += count
            await writer.drain()
            await asyncio.sleep(self.token_delay)
        self._chunk(writer, self._last_events(path, sent, usage, fault))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _event(self, path: str, index: int, text: str) -> bytes:
        if path.startswith("/generate"):
            event = {"index": index, "message": {"role": "assistant", "content": text}}
            return json.dumps(event | {"finish_reason": None}).encode() + b"\n"
        key = {"delta": {"content": text}} if "chat" in path else {"text": text}
        return sse({"choices": [{"index": 0, "finish_reason": None} | key]})

    def _last_events(self, path: str, sent: int, usage: dict[str, int], fault: str | None) -> bytes:
        if path.startswith("/generate"):
            last = {"index": sent, "message": {"role": "assistant", "content": None}}
            last["finish_reason"] = "error" if fault else "length"
            return json.dumps(last | ({"error": "rank 1 died"} if fault else {})).encode() + b"\n"
        if fault:
            return sse({"error": {"message": "rank 1 died"}}) + b"data: [DONE]\n\n"
        key = {"delta": {}} if "chat" in path else {"text": ""}
        events = sse({"choices": [{"index": 0, "finish_reason": "length"} | key]})
        if self.sends_usage:
            events += sse({"choices": [], "usage": usage})
        return events + b"data: [DONE]\n\n"


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--first_delay", type=float, default=0.0)
    parser.add_argument("--token_delay", type=float, default=0.0)
    args = parser.parse_args()
    server = FakeServer(first_delay=args.first_delay, token_delay=args.token_delay)
    listener = await server.listen(args.port)
    print(server.url, flush=True)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
