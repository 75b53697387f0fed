"""The log: two formats, levels, and never the text of a prompt, a completion or a key."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable

import httpx
import pytest

from autotp_serving.logs import JsonFormatter, TextFormatter, configure_logging
from tests.api.conftest import LiveServer

SECRET = "zebracrossing"
KEY = "key-of-a-customer"


def make_record(level: int, message: str, *args: object, **extra: object) -> logging.LogRecord:
    logger = logging.getLogger("autotp_serving.test")
    return logger.makeRecord(logger.name, level, "file", 1, message, args, None, extra=extra)


def test_text_lines_align_like_uvicorns():
    formatter = TextFormatter()
    record = make_record(logging.INFO, "a %d", 1)
    record.created = time.mktime((2026, 11, 28, 1, 2, 3, 0, 0, -1))
    assert formatter.format(record) == "11-28 01:02:03 INFO:     a 1"
    assert formatter.format(make_record(logging.WARNING, "b"))[15:] == "WARNING:  b"


def test_json_lines_hold_rank_fields_and_traceback():
    record = make_record(logging.ERROR, "line\nbreak", fields={"status": 200})
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    line = JsonFormatter(rank=3).format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert "ValueError: why" in entry.pop("traceback")
    assert entry == {
        "level": "error",
        "logger": "autotp_serving.test",
        "rank": 3,
        "message": "line\nbreak",
        "status": 200,
    }


def talk(url: str) -> None:
    """Say the secret in every way that a client has: served, refused, failing."""
    headers = {"Authorization": f"Bearer {KEY}"}
    message = {"messages": [{"role": "user", "content": SECRET}]}
    with httpx.Client(base_url=url, headers=headers) as http:
        http.post("/generate", json={"prompt": SECRET, "n_predict": 4})
        http.post("/generate_stream", json={"prompt": SECRET, "n_predict": 4, "stop": [SECRET]})
        http.post("/v1/completions", json={"prompt": [SECRET], "max_tokens": 4, "user": SECRET})
        http.post("/v1/chat/completions", json=message | {"stream": True, "max_tokens": 4})
        http.post("/v1/chat/completions", json=message | {"max_tokens": 10**6})
        http.post("/v1/chat/completions", json=message | {"temperature": SECRET})
        http.post("/tokenize", json={"prompt": SECRET})
        http.post("/generate", content=f'{{"prompt": "{SECRET}"')
        http.post("/generate", json={"prompt": SECRET, SECRET: 1})
        http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}{SECRET}"})
        http.get("/health", params={"prompt": SECRET})


@pytest.mark.live
@pytest.mark.parametrize("level", ["info", "debug"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_holds_a_prompt_or_a_key(
    start_server: Callable[..., LiveServer], level: str, form: str
) -> None:
    settings = {"log_level": level, "log_format": form, "api_key": [KEY, "another"]}
    server = start_server(config=settings, fail_at_step=40)
    talk(server.url)
    # The engine fails in the middle of a request: its traceback is in the log.
    body = {"prompt": SECRET * 3, "n_predict": 100}
    httpx.post(f"{server.url}/generate", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert server.wait() == 1
    text = "\n".join(server.lines)
    assert "rank 1 is gone" in text and "Traceback" in text
    assert text.count("req-") >= 10
    assert SECRET not in text
    assert KEY not in text
    if form == "json":
        entries = [json.loads(line) for line in server.lines]
        posts = [entry for entry in entries if entry.get("path") == "/generate"]
        assert posts[0]["status"] == 200 and posts[0]["output_tokens"] == 4
        assert posts[0]["api_key"] == "key 1"
        assert {"uvicorn.error", "autotp_serving.access"} <= {entry["logger"] for entry in entries}


def test_level_decides_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("autotp_serving", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    try:
        configure_logging("warning")
        logging.getLogger("autotp_serving.access").info("quiet")
        logging.getLogger("uvicorn.error").warning("loud")
    finally:
        for logger, state in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate, logger.level = state
    assert capsys.readouterr().err[15:] == "WARNING:  loud\n"
