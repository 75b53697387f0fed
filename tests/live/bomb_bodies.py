"""Requests that cost little to send and much to answer. No rank; for tests/live/bombs.py.

Each is asked for one token only, so that what it costs is the work on its text and not the model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

NASTY_TEMPLATE = """\
{%- macro describe(tool) -%}
{%- if tool.type in ["object", "array", "string"] -%}{{ tool.type }}
{%- else -%}{{ describe(tool) }}{%- endif -%}
{%- endmacro -%}
{%- if bomb == "loops" -%}
{%- for a in range(100000) -%}{%- for b in range(100000) -%}{%- endfor -%}{%- endfor -%}
{%- elif bomb == "memory" -%}{{ "a" * k }}
{%- elif bomb == "doubling" -%}
{%- set text = namespace(it="a") -%}
{%- for a in range(60) -%}{%- set text.it = text.it ~ text.it -%}{%- endfor -%}{{ text.it }}
{%- elif bomb == "zero" -%}{{ 1 // 0 }}
{%- elif bomb == "recursion" -%}{{ describe({"type": "float"}) }}
{%- endif -%}
"""
"""Comes before a model's own chat template; a request chooses with `chat_template_kwargs`."""

Bomb = Callable[[], tuple[str, bytes]]


def list_bombs() -> dict[str, Bomb]:
    """Bombs by name. Each call makes the path and the body anew: large ones are not kept."""
    return _schemas() | _regexes() | _grammars() | _templates() | _bodies()


def _completion(**fields: Any) -> tuple[str, bytes]:
    body = {"prompt": "x", "max_tokens": 1} | fields
    return "/v1/completions", json.dumps(body).encode()


def _chat(**fields: Any) -> tuple[str, bytes]:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | fields
    return "/v1/chat/completions", json.dumps(body).encode()


def _schemas() -> dict[str, Bomb]:
    def chain() -> dict[str, Any]:
        """Each definition an object that needs the next one."""
        count = 1000
        links = {
            f"d{number}": {
                "type": "object",
                "properties": {"a": {"$ref": f"#/$defs/d{number + 1}"}},
                "required": ["a"],
            }
            for number in range(count)
        }
        return {"$defs": links | {f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}

    def nested() -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "null"}
        for _ in range(400):
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        return schema

    def wide() -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {f"p{number}": {"$ref": "#"} for number in range(900)},
            "required": [f"p{number}" for number in range(0, 900, 2)],
        }

    def all_of() -> dict[str, Any]:
        return {
            "type": "string",
            "allOf": [{"pattern": f"^.*{chr(97 + number % 26)}.{{{number}}}$"}
                      for number in range(1, 60)],
        }  # fmt: skip

    def of(schema: Callable[[], dict[str, Any]]) -> Bomb:
        return lambda: _completion(guided_json=schema())

    return {
        "schema: chain of 1,000 references": of(chain),
        "schema: 400 levels": of(nested),
        "schema: 900 properties that recurse": of(wide),
        "schema: 59 patterns at once": of(all_of),
        "schema: multipleOf 62615533": of(lambda: {"type": "integer", "multipleOf": 62615533}),
        "schema: 100,000 items": of(
            lambda: {"type": "array", "minItems": 100_000, "items": {"type": "string"}}
        ),
        "schema: enum of 50,000": of(lambda: {"enum": [f"word {n}" for n in range(50_000)]}),
    }


def _regexes() -> dict[str, Bomb]:
    def of(pattern: str) -> Bomb:
        return lambda: _completion(guided_regex=pattern)

    return {
        "regex: counts of counts": of("((a{1000}){1000}){1000}"),
        "regex: optional letters": of("(a?){5000}a{5000}"),
        "regex: states without end": of("(.*a.{40}b|.*c.{40}d|.*e.{40}f)g"),
        "regex: letters of all scripts": of("[\\p{L}\\p{N}]{1,20000}"),
        "regex: 20,000 parentheses": of("(" * 20_000 + "a" + ")" * 20_000),
    }


def _grammars() -> dict[str, Bomb]:
    def chain(rule: str, last: str) -> str:
        lines = [rule.format(a="start" if n == 0 else f"r{n}", b=f"r{n + 1}") for n in range(5000)]
        return "\n".join([*lines, last.format(a="r5000")])

    return {
        "grammar: chain of 5,000 rules": lambda: _completion(
            guided_grammar=chain('{a}: "x" {b}', '{a}: "y"')
        ),
        "grammar: every split of a text": lambda: _completion(
            guided_grammar='start: s\ns: s s s | s s | "a" | "b" |'
        ),
        "grammar: GBNF that recurses on its left": lambda: _completion(
            guided_grammar='root ::= a\na ::= b "x" | "y"\nb ::= a "z" | b b | "w"'
        ),
        "grammar: terminals that repeat": lambda: _completion(
            guided_grammar="start: A\nA: (/[a-z]{1,500}/ /[a-m]{1,500}/){1,500}"
        ),
    }


def _templates() -> dict[str, Bomb]:
    def of(**options: Any) -> Bomb:
        return lambda: _chat(chat_template_kwargs=options)

    def deep() -> tuple[str, bytes]:
        inner = "[" * 900 + "]" * 900
        body = '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, '
        return "/v1/chat/completions", f'{body}"chat_template_kwargs": {{"a": {inner}}}}}'.encode()

    return {
        "template: 10^10 turns": of(bomb="loops"),
        "template: 20 GB of text": of(bomb="memory", k=20 * 10**9),
        "template: doubles 60 times": of(bomb="doubling"),
        "template: divides by zero": of(bomb="zero"),
        "template: recurses without end": of(bomb="recursion"),
        "template: 900 levels of options": deep,
    }


def _bodies() -> dict[str, Bomb]:
    return {
        "prompt: 31 MB": lambda: _completion(prompt="tick tock " * 3_100_000),
        "prompt: 5 MB of one letter": lambda: _completion(prompt="a" * 5_000_000),
        "prompt: 1,000,000 ids": lambda: _completion(prompt=[5] * 1_000_000),
        "chat: 20,000 messages": lambda: _chat(
            messages=[{"role": "user", "content": "x"}] * 20_000
        ),
        "body: 100,000 brackets": lambda: (
            "/v1/completions", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        ),
        "body: 34 MB": lambda: ("/v1/completions", b" " * (34 * 2**20)),
        "body: 100,000 biases": lambda: _completion(
            logit_bias={str(number): 1 for number in range(100_000)}
        ),
    }  # fmt: skip
