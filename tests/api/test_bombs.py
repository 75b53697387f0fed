"""Requests meant to cost much: each is answered 400 in words, soon, and costs nobody else."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from typing import Any, ClassVar

import httpx
import pytest

from autotp_serving.api import prompts
from autotp_serving.engine.chat_template import ChatTemplate
from tests.api import service
from tests.fakes import ByteTokenizer

LIMITS = {"compile_timeout": 0.5, "template_timeout": 0.5}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
NUM_RULES = 4000
MACROS = "{% macro f(x) %}{{ x }}{% endmacro %}"


def chain(num_links: int) -> dict[str, Any]:
    """Definitions that name each other, each an object with one required property."""
    names = [f"d{number}" for number in range(num_links + 1)]
    links: dict[str, Any] = {
        name: {
            "type": "object",
            "properties": {"a": {"$ref": f"#/$defs/{following}"}},
            "required": ["a"],
        }
        for name, following in pairwise(names)
    }
    return {"$defs": links | {names[-1]: {"type": "string"}}, "$ref": "#/$defs/d0"}


def nest(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = {"a": value}
    return value


def rules(form: str, last: str) -> str:
    lines = [form.format(number, number + 1) for number in range(NUM_RULES)]
    return "\n".join([*lines, last.format(NUM_RULES)])


GRAMMARS: dict[str, dict[str, Any]] = {
    "references": {"guided_json": chain(1000)},
    "references in a response format": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": chain(1000)},
        }
    },
    "rules in Lark": {"guided_grammar": "start: r0\n" + rules('r{}: "a" r{} "b"', 'r{}: "x"')},
    "terminals in Lark": {"guided_grammar": "start: T0\n" + rules('T{}: "a" T{}', 'T{}: "x"')},
    "rules in GBNF": {"guided_grammar": "root ::= r0\n" + rules('r{} ::= "a" r{}', 'r{} ::= "x"')},
    "multiple": {"guided_json": {"type": "integer", "multipleOf": 62615533}},
    "multiple of a fraction": {"guided_json": {"type": "number", "multipleOf": 0.62615533}},
    "schema as text": {"guided_json": "[" * 50_000},
    "groups": {"guided_regex": "(" * 20_000 + ")" * 20_000},
    "tool": {
        "tool_choice": "required",
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": chain(1000)["$defs"]}}
        ],
    },
}


def tokenizer(template: str) -> type[ByteTokenizer]:
    """Bytes, and a chat template."""

    class TemplateTokenizer(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.chat_template = template
            self.template = ChatTemplate({"default": template}, {"bos_token": "<s>"})

        def render_chat(self, messages: Any, options: Any) -> str:
            return self.template.render(messages, options)

    return TemplateTokenizer


def post(body: dict[str, Any], path: str = "/v1/chat/completions", **config: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with service.client(config=LIMITS | config) as (http, _):
            return await http.post(path, json=body)

    return asyncio.run(go())


def check_refusal(reply: httpx.Response, *words: str) -> str:
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    for word in words:
        assert word in message
    for library in ("panic", "thread '", "src/", "Traceback", "<unknown>"):
        assert library not in message
    assert "\n" not in message and len(message) < 500
    return message


def test_grammars_that_crash_or_loop_cost_their_own_request() -> None:
    async def go() -> None:
        async with service.client(config=LIMITS | {"tool_call_parser": "hermes"}) as (http, _):
            # The helper loads first, so that the times below are those of the bombs.
            await http.post("/v1/chat/completions", json=CHAT | {"guided_regex": "a"})
            for name, fields in GRAMMARS.items():
                bomb = asyncio.ensure_future(
                    http.post("/v1/chat/completions", json=CHAT | fields, timeout=60)
                )
                started = time.monotonic()
                while not bomb.done():  # others are served meanwhile
                    reply = await http.post("/v1/completions", json={"prompt": "a"})
                    assert reply.status_code == 200
                    await asyncio.sleep(0.02)
                print(name, round(time.monotonic() - started, 2), bomb.result().text[:200])
                if name != "tool":  # its definitions hang together with nothing
                    check_refusal(bomb.result())
            again = time.monotonic()
            for name in ("references", "rules in Lark", "groups"):
                await http.post("/v1/chat/completions", json=CHAT | GRAMMARS[name])
            assert time.monotonic() - again < 1.0  # known by now

    asyncio.run(go())


FAILURES = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}":
        "took longer than 0.5 s",
    "{{ 'a' * k }}": "256 MiB",
    "{{ 'a'.ljust(k) }}": "256 MiB",
    "{% for i in range(k) %}{% endfor %}": "Range too big",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ f(k % 0) }}": "ZeroDivisionError",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{% macro g(x) %}{{ g(x) }}{% endmacro %}{{ g(1) }}": "too deep",
    "{{ messages.a.b }}": "attribute",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% for i in range(90000) %}{{ '0123456789' }}{% endfor %}": "900000 characters",
}  # fmt: skip


def test_a_template_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure on its own would take a helper of its own, so they are parts of one template."""
    parts = [f"{{% elif n == {number} %}}{part}" for number, part in enumerate(FAILURES)]
    template = f"{MACROS}{{% if n == -1 %}}{{{{ f(1) }}}}{''.join(parts)}{{% endif %}}"
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(template))

    async def go() -> None:
        async with service.client(config=LIMITS) as (http, _):
            for number, words in enumerate(FAILURES.values()):
                caplog.clear()
                options = {"n": number, "k": 10**10}
                body = CHAT | {"chat_template_kwargs": options}
                check_refusal(await http.post("/v1/chat/completions", json=body), words)
                own = [one for one in caplog.records if one.name.startswith("autotp")]
                assert len(own) <= 1  # the access log's
            body = CHAT | {"chat_template_kwargs": {"n": -1}}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200

    asyncio.run(go())


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ '%9999999999d' % 1 }}", "256 MiB"),  # worked out while the template is compiled
        ("{% for %}", "Expected an expression"),
        ("{{ messages.a.b }}", "attribute"),
    ],
)
def test_a_template_that_fails_whatever_it_is_given(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(template))
    check_refusal(post(CHAT), words)


def test_a_tool_on_whose_type_a_template_recurses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of the Hermes family do so for types that they do not know."""
    template = (
        "{% macro kind(p) %}{% if p.type == 'string' %}str{% else %}{{ kind(p) }}{% endif %}"
        "{% endmacro %}{% for t in tools or [] %}{{ kind(t.function.parameters) }}{% endfor %}"
        "<tool_call>{{ messages[0].content }}"
    )
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(template))
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    body = CHAT | {"tools": [{"type": "function", "function": function}]}
    check_refusal(post(body), "too deep")
    assert post(CHAT).status_code == 200


def test_a_template_does_not_hold_up_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(loops))

    async def go() -> None:
        async with service.client(config=LIMITS) as (http, _):
            bomb = asyncio.ensure_future(http.post("/v1/chat/completions", json=CHAT, timeout=60))
            slowest = 0.0
            while not bomb.done():
                started = time.monotonic()
                await asyncio.sleep(0.01)
                slowest = max(slowest, time.monotonic() - started)
            check_refusal(bomb.result())
            assert slowest < 0.5

    asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "path", "words"),
    [
        (CHAT | {"chat_template_kwargs": nest(1, 900)}, "", "chat_template_kwargs"),
        (CHAT | {"chat_template_kwargs": nest(1, 65)}, "", "64 levels"),
        (CHAT | {"chat_template_kwargs": {"a": [[]] * 20_000}}, "", "16384 values"),
        (CHAT | {"guided_json": nest({}, 500)}, "", "64 levels"),
        (CHAT | {"tools": [{"type": "function", "function": {
            "name": "f", "parameters": nest({}, 500)}}]}, "", "64 levels"),
        (CHAT | {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {
            "name": "f", "arguments": json.dumps(nest(1, 100))}}]}]}, "", "64 levels"),
        (CHAT | {"stop": "a" * 1025}, "", "1024 characters"),
        (CHAT | {"stop": ["a"] * 65}, "", "stop"),
        (CHAT | {"logit_bias": {str(n): 1 for n in range(2000)}}, "", "1024 entries"),
        ({"prompt": "a" * 2_000_000}, "/v1/completions", "2000000 characters"),
        ({"prompt": [97] * 20_000}, "/v1/completions", "20000 tokens"),
        ({"prompt": [[97] * 20_000] * 3}, "/v1/completions", "20000 tokens"),
        ({"prompt": "a" * 2_000_000}, "/generate", "2000000 characters"),
        ({"prompt": "a" * 2_000_000}, "/tokenize", "2000000 characters"),
        ({"tokens": [97] * 200_000}, "/detokenize", "131072"),
        (CHAT | {"messages": [{"role": "user", "content": "a" * 2_000_000}]}, "",
         "characters are more"),
    ],
)  # fmt: skip
def test_what_is_too_deep_or_too_long(body: dict[str, Any], path: str, words: str) -> None:
    started = time.monotonic()
    check_refusal(post(body, path or "/v1/chat/completions"), words)
    assert time.monotonic() - started < 5.0


def test_sixty_four_levels_are_fine() -> None:
    assert post(CHAT | {"chat_template_kwargs": nest(1, 63)}).status_code == 200


def test_arguments_too_deep_to_be_read_are_a_text() -> None:
    function = {"name": "f", "arguments": '{"a": ' + "[" * 90_000}
    messages = [*CHAT["messages"], {"role": "assistant", "tool_calls": [{"function": function}]}]
    started = time.monotonic()
    assert post(CHAT | {"messages": messages}).status_code == 200
    assert time.monotonic() - started < 5.0


class SlowTokenizer(ByteTokenizer):
    """Ten million characters a second, long words, and a record of what was asked of it."""

    asked: ClassVar[list[int]] = []

    def token_bytes(self, token_id: int) -> bytes:
        return b"a" * 100 if token_id == 0 else super().token_bytes(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.asked.append(len(text))
        time.sleep(len(text) / 1e7)
        return super().encode(text)


def test_a_long_text_is_refused_by_its_first_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its characters might fit, were they all in the longest tokens there are."""
    monkeypatch.setattr(service, "ByteTokenizer", SlowTokenizer)
    monkeypatch.setattr(SlowTokenizer, "asked", [])
    reply = post({"prompt": "a" * (512 * 100)}, "/v1/completions")
    check_refusal(reply, "51200 tokens")  # short enough to be counted whole
    monkeypatch.setattr(SlowTokenizer, "asked", [])
    monkeypatch.setattr(prompts, "PIECE_LEN", 1000)
    reply = post({"prompt": "a" * (512 * 100)}, "/v1/completions")
    check_refusal(reply, "512 tokens")
    assert SlowTokenizer.asked == [1000]


def test_short_prompts_pass_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ByteTokenizer", SlowTokenizer)

    async def go() -> None:
        async with service.client(max_model_len=200_000, num_blocks=20_000) as (http, _):
            long = [
                asyncio.ensure_future(
                    http.post("/tokenize", json={"prompt": "a" * 1_000_000}, timeout=60)
                )
                for _ in range(8)
            ]
            await asyncio.sleep(0.05)
            started = time.monotonic()
            for size in (10, 5000, 50_000):
                reply = await http.post("/tokenize", json={"prompt": "a" * size})
                assert reply.json()["count"] == size
            assert time.monotonic() - started < 0.5
            assert not all(one.done() for one in long)
            await asyncio.gather(*long)

    asyncio.run(go())


def test_a_panic_of_the_tokenizer_is_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What pyo3 raises: no Exception, so that most handlers let it pass."""

    def fail(self: ByteTokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(ByteTokenizer, "encode", fail)
    for size in (5, 2000):
        monkeypatch.setattr(prompts, "MAX_INLINE_CHARS", 10)
        reply = post({"prompt": "a" * size}, "/v1/completions")
        check_refusal(reply, "more than the tokenizer can take")


def test_a_structure_that_became_too_complex_is_the_clients_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from autotp_serving.engine import grammar_guide

    def allowed(self: grammar_guide.MatcherGuide, num_ahead: int = 0) -> bytes:
        self.error = grammar_guide.TOO_COMPLEX
        return self._grammar.first_mask

    monkeypatch.setattr(grammar_guide.MatcherGuide, "allowed", allowed)
    reply = post({"prompt": "a", "guided_choice": ["yes", "no"]}, "/v1/completions")
    check_refusal(reply, "too complex")
    assert reply.json()["error"]["code"] == "structure_too_complex"


def test_where_no_process_is_free_the_answer_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp_serving.engine.sandbox import Sandbox
    from autotp_serving.engine.sandbox_helper import SandboxBusyError

    def run(*_: Any) -> None:
        raise SandboxBusyError

    monkeypatch.setattr(Sandbox, "_run", run)
    reply = post({"prompt": "a", "guided_regex": "a"}, "/v1/completions")
    assert reply.status_code == 503 and reply.headers["Retry-After"]
    assert reply.json()["error"]["code"] == "busy"
