"""Web pages that have their own name lead to this server, and names that are meant to."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from autotp_serving.api.hosts import AllowedHosts
from autotp_serving.command_line import parse_args
from autotp_serving.config import ConfigError
from tests.api.service import client

OURS = AllowedHosts(["gpu-box", "Llm.Example.com."])
MARK = {"Origin": "http://evil.example:8000"}


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8000", "LOCALHOST", "localhost.", "a.localhost:1"),
        *("127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80", "[::1]", "[::1]:8000", "[fd00::2]:8000"),
        *("gpu-box:8000", "GPU-BOX", "llm.example.com", "llm.example.com.:443"),
    ],
)
def test_names_that_lead_here_on_purpose(host: str) -> None:
    assert OURS.knows(host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("notlocalhost", "evil.example@localhost", "localhost:8000:9", "[::1].evil.example", ""),
        *("gpu-box.evil.example", "example.com", "x.llm.example.com", "127.0.0.1 evil", "[evil]"),
        *("localhost,evil.example", "::1", "999.0.0.1"),
    ],
)
def test_names_that_a_page_may_have_chosen(host: str) -> None:
    assert not OURS.knows(host)


def ask(
    headers: dict[str, str] | list[tuple[str, str]],
    path: str = "/v1/models",
    **config: Any,
) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(config=config) as (http, _):
            return await http.get(path, headers=headers)

    return asyncio.run(go())


@pytest.mark.parametrize("mark", [MARK, {"Sec-Fetch-Site": "same-origin"}, {"Origin": "null"}])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/nowhere"])
def test_a_page_under_a_foreign_name_reads_nothing(mark: dict[str, str], path: str) -> None:
    reply = ask(mark | {"Host": "evil.example:8000"}, path)
    assert reply.status_code == 403
    error = reply.json()["error"]
    assert error["code"] == "host_not_allowed"
    assert "'evil.example:8000'" in error["message"] and "--allowed-host" in error["message"]
    assert ask(mark | {"Host": "localhost:8000"}, "/v1/models").status_code == 200


def test_other_clients_may_call_us_what_they_like() -> None:
    assert ask({"Host": "a-name-of-the-proxy"}).status_code == 200


def test_two_hosts_are_none() -> None:
    hosts = [("Host", "localhost"), ("Host", "evil.example")]
    assert ask([*hosts, *MARK.items()]).status_code == 403


def test_the_hosts_own_name_and_further_ones_are_allowed() -> None:
    own = socket.gethostname()
    assert ask(MARK | {"Host": f"{own}:8000"}).status_code == 200
    named = {"allowed_host": ("llm.example.com", "other")}
    assert ask(MARK | {"Host": "llm.example.com"}, **named).status_code == 200
    assert ask(MARK | {"Host": "other"}, **named).status_code == 200
    assert ask(MARK | {"Host": "third"}, **named).status_code == 403


def test_pages_that_may_call_may_do_so_under_any_name() -> None:
    trusted = {"cors_origin": ("https://chat.example",)}
    asks = {"Host": "llm.example.com", "Origin": "https://chat.example"}
    assert ask(asks, **trusted).status_code == 200
    assert ask(asks | {"Origin": "https://evil.example"}, **trusted).status_code == 403
    assert ask(MARK | {"Host": "x"}, cors_origin=("*",)).status_code == 200


def test_the_flag_is_repeatable_and_takes_names_only() -> None:
    flags = ["--model", "m", "--allowed-host", "a.example", "--allowed-host", "b", "c"]
    assert parse_args(flags).allowed_host == ("a.example", "b", "c")
    for wrong in ("https://a.example", "a.example:80", "*", "a/b", ""):
        with pytest.raises(ConfigError, match="--allowed-host"):
            parse_args(["--model", "m", "--allowed-host", wrong])
