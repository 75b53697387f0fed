"""run_batch.py: every request answered once, whatever ends in between."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import run_batch


class EchoServer(ThreadingHTTPServer):
    """Answers with the prompt; "no" is a 400, and every third request meets a full server."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class EchoHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, EchoServer)
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        with server.lock:
            server.asked[prompt] += 1
            is_full = sum(server.asked.values()) % 3 == 0
        status = 503 if is_full else 400 if prompt == "no" else 200
        data = json.dumps({"text": prompt, "path": self.path}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Request-Id", f"req-{prompt}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EchoServer]:
    monkeypatch.setattr(run_batch, "RETRY_SECONDS", 0.01)
    with EchoServer() as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        yield echo
        echo.shutdown()


def line(prompt: str, **changes: Any) -> dict[str, Any]:
    body = {"prompt": prompt}
    return {"custom_id": prompt, "method": "POST", "url": "/v1/completions", "body": body} | changes


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    answers = [json.loads(one) for one in path.read_text().splitlines()]
    assert len({one["custom_id"] for one in answers}) == len(answers)
    return {one["custom_id"]: one["response"] for one in answers}


def test_all_are_answered_and_a_second_run_asks_nothing(tmp_path: Path, server: EchoServer) -> None:
    prompts = [f"p{number}" for number in range(30)]
    requests = write(tmp_path / "in.jsonl", *map(line, prompts))
    words = ["-i", str(requests), "-o", str(tmp_path / "out.jsonl"), "--url", server.url]
    assert run_batch.main(words) == 0
    answers = read(tmp_path / "out.jsonl")
    assert {name: one["body"]["text"] for name, one in answers.items()} == {p: p for p in prompts}
    assert answers["p1"]["request_id"] == "req-p1" and answers["p1"]["status_code"] == 200
    num_asked = sum(server.asked.values())
    assert run_batch.main(words) == 0
    assert sum(server.asked.values()) == num_asked


def test_a_run_that_crashed_goes_on_where_it_stood(tmp_path: Path, server: EchoServer) -> None:
    requests = write(tmp_path / "in.jsonl", *map(line, ["a", "b", "no"]))
    output = tmp_path / "out.jsonl"
    words = ["-i", str(requests), "-o", str(output), "--url", server.url]
    assert run_batch.main(words) == 1, "a 400 is an answer, and told"
    answers = output.read_text().splitlines(keepends=True)
    kept = next(one for one in answers if '"custom_id": "a"' in one)
    output.write_text(kept + answers[-1][:30])  # the last line is cut
    server.asked.clear()
    assert run_batch.main(words) == 1
    assert set(server.asked) == {"b", "no"}
    assert {name: one["status_code"] for name, one in read(output).items()} == {
        "a": 200, "b": 200, "no": 400,
    }  # fmt: skip


def test_a_server_that_does_not_come_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_batch, "RETRY_SECONDS", 0.01)
    requests = write(tmp_path / "in.jsonl", line("a"))
    words = ["-i", str(requests), "-o", str(tmp_path / "out.jsonl"), "--patience", "0.1"]
    assert run_batch.main([*words, "--url", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([1], "is not a JSON object"),
        (line("a"), "no other line has"),
        (line("b", method="GET"), '"method": "POST"'),
        (line("b", url="/v1/x HTTP/1.1\r\n"), "no url has"),
        (line("b", body={"stream": True}), '"stream": true'),
    ],
)
def test_a_line_that_cannot_be_asked_is_named_before_anything_is(
    bad: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write(tmp_path / "in.jsonl", line("a"), bad)
    words = ["-i", str(requests), "-o", str(tmp_path / "out.jsonl")]
    assert run_batch.main(words) == 2
    error = capsys.readouterr().err
    assert "line 2" in error and expected in error
    other = write(tmp_path / "other.jsonl", {"x": 1})
    assert run_batch.main(["-i", str(write(requests, line("a"))), "-o", str(other)]) == 2
