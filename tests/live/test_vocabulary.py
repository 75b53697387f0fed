"""Two ranks, a model of 300 rows and a tokenizer of 319 tokens: refusals, and all live on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.live.launch import CACHE_FLAGS, Launch, mpirun
from tests.model.checkpoints import save_tiny_llama

pytestmark = pytest.mark.live

BODIES = [
    ({"prompt": "a<extra_59>b"}, "prompt"),
    ({"prompt": [310]}, "prompt"),
    ({"prompt": [310], "echo": True, "max_tokens": 0, "logprobs": 1}, "prompt"),
    ({"prompt": "a", "logit_bias": {"310": 5}}, "logit_bias"),
    ({"prompt": "a", "stop_token_ids": [310], "min_tokens": 2}, "stop_token_ids"),
    ({"prompt": "a", "guided_grammar": 'start: "a" <[310]>'}, "guided_grammar"),
    ({"messages": [{"role": "user", "content": "a<extra_59>b"}]}, "messages"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import AutoTokenizer

    folder = save_tiny_llama(tmp_path / "model", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(61)])
    tokenizer.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_beyond_the_model_do_not_reach_it(
    folder: Path, start: Callable[..., Launch]
) -> None:
    flags = ["--model", str(folder), "--low-bit", "bf16", "--dtype", "float32", *CACHE_FLAGS]
    server = start(mpirun(2), *flags).wait_ready()
    assert "The tokenizer has 319 tokens, the model only 300" in server.log
    for body, field in BODIES:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        reply = httpx.post(server.url + path, json=body, timeout=60)
        assert reply.status_code == 400, (body, reply.text)
        assert reply.json()["error"]["param"] == field, (body, reply.text)
    for body in ({"prompt": [299]}, {"prompt": "a", "guided_regex": "(.|\\n){3,9}"},
                 {"prompt": "a", "logit_bias": {"299": 100}}):  # fmt: skip
        body |= {"temperature": 1.0, "max_tokens": 12}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200, (body, reply.text)
    assert server.health()["status"] == "ok"
