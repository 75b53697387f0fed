"""A tokenizer with more tokens than the model has rows: 400 by name at every door."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api import service
from tests.fakes import ByteTokenizer, FakeRunner

NUM_ROWS = 258
EXTRA = NUM_ROWS + 9


class MoreTokens(ByteTokenizer):
    """A "~" is a token that the model does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = NUM_ROWS

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [EXTRA if byte == ord("~") else byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return b"~" if token_id == EXTRA else super().token_bytes(token_id)


def message(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GRAMMAR = f'start: "a" <[{EXTRA}]>'
REFUSED = [
    ("/generate", {"prompt": "a~b"}, "prompt"),
    ("/generate_stream", {"prompt": "a~b"}, "prompt"),
    ("/generate", {"prompt": "a~b", "echo": True, "logprobs": 1}, "prompt"),
    (COMPLETIONS, {"prompt": "a~b"}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "a~b"]}, "prompt"),
    (COMPLETIONS, {"prompt": [97, EXTRA]}, "prompt"),
    (COMPLETIONS, {"prompt": [NUM_ROWS]}, "prompt"),
    (COMPLETIONS, {"prompt": [[97], [NUM_ROWS]]}, "prompt"),
    (COMPLETIONS, {"prompt": [EXTRA], "echo": True, "max_tokens": 0, "logprobs": 2}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(NUM_ROWS): 5}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(2**40): 5}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [NUM_ROWS]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": GRAMMAR}, "guided_grammar"),
    (CHAT, message("a~b"), "messages"),
    (CHAT, message("a~b") | {"stream": True}, "messages"),
    (CHAT, message("a") | {"logit_bias": {str(NUM_ROWS): 5}}, "logit_bias"),
    (CHAT, message("a") | {"guided_grammar": GRAMMAR}, "guided_grammar"),
    ("/tokenize", {"prompt": "a~b"}, "prompt"),
    ("/tokenize", message("a~b"), "messages"),
    ("/detokenize", {"tokens": [EXTRA]}, "tokens"),
]
SERVED = [
    (COMPLETIONS, {"prompt": [NUM_ROWS - 1, 97], "max_tokens": 2}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(NUM_ROWS - 1): 5}}),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": f'start: "a" <[{NUM_ROWS - 1}]>'}),
    (COMPLETIONS, {"prompt": "a", "guided_choice": ["a~b", "c"], "temperature": 1.0}),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "(.|\\n){1,9}", "temperature": 1.0}),
]


def test_what_the_model_has_no_row_for_is_refused_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "ByteTokenizer", MoreTokens)
    monkeypatch.setattr(
        service, "FakeRunner", lambda *args, **rest: FakeRunner(*args, **rest, vocab_size=NUM_ROWS)
    )

    async def go() -> None:
        async with service.client() as (http, served):
            for path, body, field in REFUSED:
                reply = await http.post(path, json=body)
                assert reply.status_code == 400, (path, body, reply.text)
                assert reply.json()["error"]["param"] == field, (path, body, reply.text)
            assert not served.runner.batches
            for path, body in SERVED:
                reply = await http.post(path, json=body)
                assert reply.status_code == 200, (path, body, reply.text)
            assert served.engine.engine.failure is None

    asyncio.run(go())
