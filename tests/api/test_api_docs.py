"""docs/api.md: its tables come from the schemas, its routes are all there, its examples work."""

from __future__ import annotations

import json
import re
import subprocess
from typing import get_args

import pytest

from autotp_serving.api import (
    adapter_routes,
    native_schemas,
    sampling_fields,
    schemas,
    structured_output,
    tokenize_routes,
)
from autotp_serving.api.anthropic import schemas as anthropic_schemas
from autotp_serving.api.native_schemas import GenerateReply, Logprob, Message, TokenLogprob
from autotp_serving.api.openai import chat_schemas, peer_fields, tool_schemas
from autotp_serving.api.openai import schemas as openai_schemas
from autotp_serving.api.pooling import schemas as pooling_schemas
from autotp_serving.api.responses import schemas as responses_schemas
from autotp_serving.api.schemas import ErrorReply, GenerousModel, StrictModel
from autotp_serving.structured_output import ReasoningFormat, ToolFormat
from scripts.api_tables import DOCUMENT, MODELS, fill
from tests.api.conftest import LiveServer
from tests.api.service import build_service

TEXT = DOCUMENT.read_text(encoding="utf-8")
MODULES = (
    schemas, native_schemas, openai_schemas, chat_schemas, sampling_fields, structured_output,
    tool_schemas, tokenize_routes, responses_schemas, anthropic_schemas, peer_fields,
    pooling_schemas, adapter_routes,
)  # fmt: skip
EXAMPLES = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)


def test_tables_are_those_of_the_schemas():
    assert fill(TEXT) == TEXT, "run: python -m scripts.api_tables"


def test_every_format_of_calls_and_reasoning_is_told():
    for name in get_args(ToolFormat):
        assert f"\n| `{name}` | " in TEXT
    for name in get_args(ReasoningFormat):
        assert f"`{name}` (" in TEXT


def test_every_body_has_a_table():
    replies = {ErrorReply, GenerateReply, Message, Logprob, TokenLogprob}
    replies |= {schemas.ErrorDetail, StrictModel, GenerousModel}
    bodies = {
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StrictModel)
    } - replies
    assert {model.__name__ for model in MODELS} == {body.__name__ for body in bodies}
    for body in bodies:
        assert f"<!-- fields of {body.__name__} -->" in TEXT


def test_every_route_is_listed():
    app = build_service().app
    routes = {
        f"{method} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in map(str.upper, methods)
    }
    listed = set(re.findall(r"`((?:GET|POST) /[^`]*)`", TEXT))
    missing = routes - listed
    assert not missing
    assert listed - routes == {"GET /", "GET /docs", "GET /openapi.json"}


@pytest.mark.live
@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_work(live: LiveServer, command: str):
    command = command.replace("http://localhost:8000", live.url.replace("0.0.0.0", "127.0.0.1"))
    result = subprocess.run(
        ["bash", "-c", f"{command.rstrip()} -w '\\n%{{http_code}}'"],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    *body, status = result.stdout.splitlines()
    assert status == "200", result.stdout
    assert '{"error"' not in result.stdout
    if "metrics" not in command and "stream" not in command:
        json.loads("\n".join(body))


def test_the_reply_shown_is_the_one_given():
    shown = re.search(r"```json\n(\{\"index\".*?)\n```", TEXT)[1]
    GenerateReply.model_validate(json.loads(shown))
