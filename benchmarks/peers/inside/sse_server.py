"""The least that a library without a server needs to be measured over HTTP; standard library only.

`GET /health` and `POST /v1/completions` with a prompt of token ids, always streamed, always past
the end-of-sequence token. A token's number stands for its text.
"""

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Job:
    """One request; whoever runs it calls `put` for each token, then `end`."""

    def __init__(self, prompt: list[int], max_tokens: int) -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self._tokens: queue.SimpleQueue = queue.SimpleQueue()

    def put(self, token: int) -> None:
        self._tokens.put(token)

    def end(self) -> None:
        self._tokens.put(None)

    def __iter__(self):
        return iter(self._tokens.get, None)


def serve(port: int, jobs: queue.SimpleQueue) -> None:
    """Put every request into `jobs`; returns at once, the server runs in threads of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/health"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            job = Job(body["prompt"], body["max_tokens"])
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            jobs.put(job)
            count = 0
            for token in job:
                count += 1
                reason = "length" if count == job.max_tokens else None
                self._send({"choices": [{"text": f" {token}", "finish_reason": reason}]})
            usage = {"prompt_tokens": len(job.prompt), "completion_tokens": count}
            self._send({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, event: dict) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def log_message(self, *words: object) -> None:
            """Keep quiet: a line per request is of no use here."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
