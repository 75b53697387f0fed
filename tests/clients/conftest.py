"""A live server with a key and tools, for clients that live in environments of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.api.conftest import LiveServer

KEY = "client-key"


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """Where OpenAI's routes begin. SERVER_PYTHON names the server's own interpreter."""
    options = {
        "config": {"port": 0, "api_key": [KEY], "tool_call_parser": "hermes"},
        "book": {
            "tool add\nuser: 1 + 2?\nassistant: ": (
                '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
            )
        },
    }
    server = LiveServer(options, python=os.environ.get("SERVER_PYTHON", sys.executable))
    yield server.url.replace("0.0.0.0", "127.0.0.1") + "/v1"
    server.stop()
