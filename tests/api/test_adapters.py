"""LoRA adapters over HTTP: models by name, loaded and unloaded by admins alone."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from autotp_serving.api.api_keys import load_api_keys
from autotp_serving.config import ConfigError, ServingConfig
from tests.api.service import Service
from tests.api.test_middleware import bearer, run

SETTINGS = {"enable_lora": True, "admin_api_key": ("boss",), "served_model_name": ("base",)}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ONE = {"lora_name": "one", "lora_path": "/adapters/one"}


def test_an_adapter_is_a_model_until_it_is_unloaded() -> None:
    async def go(http: httpx.AsyncClient, service: Service) -> None:
        async def ask(model: str) -> httpx.Response:
            body = {"model": model, "prompt": "hi", "max_tokens": 8, "temperature": 0}
            return await http.post("/v1/completions", json=body)

        assert (await ask("one")).status_code == 404
        reply = await http.post(LOAD, json=ONE, headers=bearer("boss"))
        assert reply.status_code == 200 and "'one' added" in reply.text
        models = (await http.get("/v1/models")).json()["data"]
        assert [(one["id"], one["parent"]) for one in models] == [("base", None), ("one", "base")]
        assert (await http.get("/v1/models/one")).json()["parent"] == "base"
        assert "/adapters" not in str(models)
        base, one = await asyncio.gather(ask("base"), ask("one"))
        assert one.json()["model"] == "one"
        assert one.json()["choices"][0]["text"] != base.json()["choices"][0]["text"]
        messages = [{"role": "user", "content": "hi"}]
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
            body = {"model": "one", "max_tokens": 8, "messages": messages}
            if path == "/v1/responses":
                body = {"model": "one", "max_output_tokens": 8, "input": "hi"}
            num_before = len(service.runner.batches)
            assert (await http.post(path, json=body)).json()["model"] == "one"
            assert all(batch.adapters == [1] for batch in service.runner.batches[num_before:])
        again = await http.post(LOAD, json=ONE, headers=bearer("boss"))
        assert again.status_code == 400 and "taken" in again.text
        gone = await http.post(UNLOAD, json={"lora_name": "one"}, headers=bearer("boss"))
        assert gone.status_code == 200
        assert (await ask("one")).status_code == 404
        gone = await http.post(UNLOAD, json={"lora_name": "one"}, headers=bearer("boss"))
        assert gone.status_code == 404

    run(go, config=SETTINGS)


@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({}, None, 403),
        ({"api_key": ("guest",)}, None, 401),
        ({"api_key": ("guest",)}, "guest", 403),
        ({"admin_api_key": ()}, "boss", 403),
        ({"api_key": ("guest",)}, "boss", 200),
    ],
)
def test_admins_alone_may_load(settings: dict, key: str | None, status: int) -> None:
    async def go(http: httpx.AsyncClient, service: Service) -> None:
        headers = bearer(key) if key else {}
        reply = await http.post(LOAD, json=ONE, headers=headers)
        assert reply.status_code == status, reply.text
        if status == 200:  # a key for all else, too
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
        else:
            assert not service.runner.adapters

    run(go, config=SETTINGS | settings)


def test_an_admins_key_is_nobody_elses() -> None:
    config = ServingConfig(model_path="m", api_key=("a",))
    with pytest.raises(ConfigError, match="none of the others"):
        load_api_keys(config, {"AUTOTP_ADMIN_API_KEY": "a,b"})
    with pytest.raises(ConfigError, match="AUTOTP_ADMIN_API_KEY holds no key"):
        load_api_keys(config, {"AUTOTP_ADMIN_API_KEY": " "})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_modules": ("/adapters/one",)}, "NAME=FOLDER"),
        ({"lora_modules": ("one=a", "one=b")}, "taken"),
        ({"lora_modules": ("m=a",)}, "taken"),
        ({"lora_modules": ("one=a", "two=b"), "max_loras": 1}, "--max-loras"),
        ({"enable_lora": True, "data_parallel_size": 2}, "--data-parallel-size"),
        ({"enable_lora": True, "plan": True}, "--plan"),
        ({"max_lora_rank": 1000}, "--max-lora-rank"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ServingConfig(model_path="m", **settings)
