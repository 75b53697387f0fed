"""The guard: keys, turns and shares between them, deadlines, other origins, TLS."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from autotp_serving.api.api_keys import ApiKeys, load_api_keys
from autotp_serving.api.port import check_tls
from autotp_serving.config import ConfigError, ServingConfig
from tests.api.conftest import LiveServer
from tests.api.service import Service, client

BODY = {"prompt": "What is AI?", "n_predict": 8}
LONG = {"prompt": "x", "n_predict": 400, "ignore_eos": True}


def run(go: Callable[[httpx.AsyncClient, Service], Any], **options: Any) -> Any:
    """Run a test's coroutine against a service of its own."""

    async def main() -> Any:
        async with client(**options) as (http, service):
            return await go(http, service)

    return asyncio.run(main())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def headers(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode("latin-1"))]


# Keys


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ({}, 401),
        (bearer("wrong"), 401),
        (bearer("key-on"), 401),
        (bearer("key-one "), 200),
        (bearer("key-two"), 200),
        ({"Authorization": "bearer key-one"}, 200),
        ({"Authorization": "key-one"}, 401),
        ({"Authorization": "Basic key-one"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer key-one key-two"}, 401),
    ],
)
def test_only_known_keys_are_served(sent, code):
    async def go(http: httpx.AsyncClient, _: Service) -> None:
        reply = await http.post("/generate", json=BODY, headers=sent)
        assert reply.status_code == code
        if code == 401:
            error = reply.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["code"] == "invalid_api_key"
            # litellm, for one, tells a refused key by these words.
            assert error["message"].startswith("Incorrect API key provided") == bool(sent)
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.headers["x-request-id"]

    run(go, config={"api_key": ("key-one", "key-two")})


def test_every_route_but_four_wants_a_key():
    async def go(http: httpx.AsyncClient, service: Service) -> dict[str, int]:
        paths = list(service.app.openapi()["paths"])
        paths += ["/docs", "/openapi.json", "/", "/nowhere", "/generate", "/health/"]
        return {
            path: (await http.request(method, path)).status_code
            for path in paths
            for method in ("GET", "POST")
        }

    codes = run(go, config={"api_key": ("key",)})
    assert len(codes) > 12
    let_in = {path for path, code in codes.items() if code != 401}
    assert let_in <= {"/", "/docs", "/health", "/health/", "/ready"}
    assert "/health" in let_in


def test_a_stranger_is_refused_before_the_body_is_read():
    async def go(http: httpx.AsyncClient, _: Service) -> int:
        async def endless():
            while True:
                yield b"x" * 1000
                raise AssertionError("the body was read")

        return (await http.post("/generate", content=endless())).status_code

    assert run(go, config={"api_key": ("key",)}) == 401


def test_tenants_have_names_that_tell_nothing():
    keys = ApiKeys(["alpha", "beta", "alpha"])
    assert keys.find_tenant(headers("alpha")) == "key 1"
    assert keys.find_tenant(headers("beta")) == "key 2"
    assert keys.find_tenant(headers("gamma")) is None
    assert keys.find_tenant([]) is None
    assert "alpha" not in str(vars(keys))
    assert ApiKeys(["alpha"]).find_tenant(headers("alpha")) == ""
    assert ApiKeys([]).find_tenant([]) == ""


def test_every_known_key_is_compared_whichever_matches(monkeypatch):
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("autotp_serving.api.api_keys.hmac.compare_digest", compare)
    keys = ApiKeys(["alpha", "beta", "gamma"])
    for shown in ("alpha", "gamma", "none"):
        compared.clear()
        keys.find_tenant(headers(shown))
        assert len(compared) == 3


def load(environ: dict[str, str] | None = None, **settings: Any) -> ApiKeys:
    return load_api_keys(ServingConfig(model_path="fake", **settings), environ or {})


def test_keys_come_from_flag_file_and_environment(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfile-key\n\n  other  \n")
    keys = load({"AUTOTP_API_KEY": "env-key, env-two"}, api_key=("k",), api_key_file=str(path))
    for key in ("k", "file-key", "other", "env-key", "env-two"):
        assert keys.find_tenant(headers(key)) is not None
    assert keys.find_tenant(headers("# ours")) is None
    assert keys.find_tenant([]) is None and load().find_tenant([]) == ""


def test_an_empty_source_does_not_open_the_server(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError, match=r"--api-key-file .* holds no key"):
        load(api_key_file=str(path))
    with pytest.raises(ConfigError, match=r"--api-key-file .* cannot be read"):
        load(api_key_file=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="AUTOTP_API_KEY holds no key"):
        load({"AUTOTP_API_KEY": ""})
    with pytest.raises(ConfigError, match="visible ASCII") as caught:
        load(api_key=("with space",))
    assert "with space" not in str(caught.value)


# Turns and shares


def test_a_flooding_key_gets_429_and_another_still_gets_in():
    async def go(http: httpx.AsyncClient, service: Service) -> None:
        async def post(key: str) -> httpx.Response:
            return await http.post("/generate", json=LONG, headers=bearer(key))

        flood = [asyncio.create_task(post("flood")) for _ in range(20)]
        await wait_until(lambda: sum(task.done() for task in flood) == 14)
        refused = [task.result() for task in flood if task.done()]
        assert {reply.status_code for reply in refused} == {429}
        assert {reply.json()["error"]["code"] for reply in refused} == {"share_full"}
        assert all(1 <= int(reply.headers["retry-after"]) <= 600 for reply in refused)
        calm = asyncio.create_task(post("calm"))
        await wait_until(lambda: service.engine.num_open == 7)
        assert not calm.done()
        scrape = (await http.get("/metrics", headers=bearer("calm"))).text
        assert 'admission_rejections_total{model_name="letters",reason="share_full"} 14' in scrape
        for task in (*flood, calm):
            task.cancel()

    options = {"api_key": ("flood", "calm"), "max_num_seqs": 2, "max_queue_len": 10}
    run(go, delay=0.01, config=options)


def test_a_full_queue_is_503_for_everyone():
    async def go(http: httpx.AsyncClient, service: Service) -> None:
        tasks = [asyncio.create_task(http.post("/generate", json=LONG)) for _ in range(6)]
        await wait_until(lambda: any(task.done() for task in tasks))
        (refused,) = [task.result() for task in tasks if task.done()]
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        for task in tasks:
            task.cancel()

    run(go, delay=0.01, config={"max_num_seqs": 1, "max_queue_len": 4})


def test_calm_key_is_served_within_a_turn_of_the_flood():
    """The flood's requests take 40 steps each, two at a time: ten rounds if it came last."""

    async def go(http: httpx.AsyncClient, service: Service) -> None:
        body = LONG | {"n_predict": 40}
        finished: list[str] = []

        async def post(key: str) -> None:
            reply = await http.post("/generate", json=body, headers=bearer(key))
            assert reply.status_code == 200
            finished.append(key)

        flood = [asyncio.create_task(post("flood")) for _ in range(20)]
        await wait_until(lambda: service.engine.num_open == 20)
        await asyncio.gather(post("calm"), *flood)
        assert finished.index("calm") <= 5

    run(go, delay=0.001, config={"api_key": ("flood", "calm"), "max_num_seqs": 2})


# Deadlines


def test_a_late_answer_is_504_and_frees_its_blocks():
    async def go(http: httpx.AsyncClient, service: Service) -> None:
        for path, body in (
            ("/generate", LONG),
            ("/v1/completions", {"prompt": "x", "max_tokens": 400, "ignore_eos": True}),
        ):
            reply = await http.post(path, json=body)
            assert reply.status_code == 504
            error = reply.json()["error"]
            assert error["code"] == "timeout" and "--request-timeout" in error["message"]
        await wait_until(lambda: service.engine.engine.stats().num_held_blocks == 0)
        assert (await http.post("/generate", json=BODY)).status_code == 200

    run(go, delay=0.005, config={"request_timeout": 0.2})


def test_a_late_stream_ends_with_an_error_that_says_so():
    async def go(http: httpx.AsyncClient, _: Service) -> None:
        lines = (await http.post("/generate_stream", json=LONG)).text.splitlines()
        assert len(lines) > 5
        last = json.loads(lines[-1])
        assert last["finish_reason"] == "error"
        assert last["error"] == "the request took longer than 0.2 s (--request-timeout)"
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        events = (await http.post("/v1/completions", json=body)).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-2] == "data: [DONE]"

    run(go, delay=0.005, config={"request_timeout": 0.2})


def test_the_deadline_counts_the_wait_in_the_queue():
    async def go(http: httpx.AsyncClient, _: Service) -> list[int]:
        tasks = [http.post("/generate", json=LONG | {"n_predict": 60}) for _ in range(2)]
        return sorted(reply.status_code for reply in await asyncio.gather(*tasks))

    options = {"request_timeout": 0.9, "max_num_seqs": 1}
    assert run(go, delay=0.01, config=options) == [200, 504]


# Other origins


def test_pages_of_named_origins_may_call_and_read_refusals():
    async def go(http: httpx.AsyncClient, _: Service) -> None:
        asks = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
        preflight = await http.options("/v1/chat/completions", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = await http.get("/v1/models", headers={"Origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
        foreign = await http.options(
            "/v1/models", headers=asks | {"Origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in foreign.headers

    run(go, config={"api_key": ("key",), "cors_origin": ("https://chat.example",)})


def test_without_origins_no_page_may_call():
    async def go(http: httpx.AsyncClient, _: Service) -> httpx.Response:
        return await http.get("/health", headers={"Origin": "https://chat.example"})

    assert "access-control-allow-origin" not in run(go).headers


# TLS


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    names = {"cert": str(folder / "cert.pem"), "key": str(folder / "key.pem")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-out", names["cert"], "-keyout", names["key"]],
        check=True, capture_output=True,
    )  # fmt: skip
    return names


@pytest.mark.live
def test_https_is_served(start_server: Callable[..., LiveServer], pem: dict[str, str]):
    server = start_server(config={"ssl_certfile": pem["cert"], "ssl_keyfile": pem["key"]})
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=pem["cert"])
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    reply = httpx.post(f"{url}/generate", json=BODY, verify=context)
    assert reply.json()["message"]["content"] == "a branch"


@pytest.mark.live
def test_a_crowd_that_never_speaks_tls_is_not_in_the_way(
    start_server: Callable[..., LiveServer], pem: dict[str, str]
):
    settings = {"ssl_certfile": pem["cert"], "ssl_keyfile": pem["key"]}
    server = start_server(files=110, seconds=1.0, config=settings)
    context = ssl.create_default_context(cafile=pem["cert"])
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    address = ("127.0.0.1", httpx.URL(url).port)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, 5)) for _ in range(200)]
        for _ in range(3):
            assert httpx.get(f"{url}/health", verify=context).status_code == 200
        assert silent[-1].recv(100) == b""  # it has had its time
    assert httpx.post(f"{url}/generate", json=BODY, verify=context).status_code == 200
    assert not any("Traceback" in line for line in server.lines)


def tls(**settings: str) -> None:
    check_tls(ServingConfig(model_path="fake", **settings))


def test_tls_mistakes_are_named_before_anything_is_loaded(pem: dict[str, str], tmp_path: Path):
    tls(ssl_certfile=pem["cert"], ssl_keyfile=pem["key"])
    missing = str(tmp_path / "none.pem")
    with pytest.raises(ConfigError, match=r"--ssl-certfile .*none.pem cannot be read"):
        tls(ssl_certfile=missing, ssl_keyfile=pem["key"])
    with pytest.raises(ConfigError, match=r"--ssl-keyfile .*none.pem cannot be read"):
        tls(ssl_certfile=pem["cert"], ssl_keyfile=missing)
    with pytest.raises(ConfigError, match="are no certificate with its key"):
        tls(ssl_certfile=pem["cert"])
    with pytest.raises(ConfigError, match="are no certificate with its key"):
        tls(ssl_certfile=pem["key"], ssl_keyfile=pem["key"])
    locked = str(tmp_path / "locked.pem")
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", pem["key"], "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="without a password"):
        tls(ssl_certfile=pem["cert"], ssl_keyfile=locked)


def test_a_clients_own_name_for_its_request() -> None:
    """It comes back where it may stand in a log; any other is replaced."""

    async def go() -> None:
        async with client() as (http, _):
            for path in ("/v1/models", "/nowhere"):
                for sent in ("abc-1:2/x", "a" * 128):
                    reply = await http.get(path, headers={"X-Request-Id": sent})
                    assert reply.headers.get_list("x-request-id") == [sent]
                for sent in ("", "a b", "a" * 129, "a\tb", "<x>"):
                    reply = await http.get(path, headers={"X-Request-Id": sent})
                    assert reply.headers["x-request-id"].startswith("req-")

    asyncio.run(go())
