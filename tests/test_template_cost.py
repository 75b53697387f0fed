"""Which chat templates may run beside everything else, and which only apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotp_serving.engine.template_cost import is_cheap

DEMO = Path(__file__).parents[1] / "demo_model" / "tokenizer_config.json"

EVERY = "{% for m in messages %}"
END = "{% endfor %}"

CHEAP = {
    "demo": json.loads(DEMO.read_text())["chat_template"],
    "roles": EVERY + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{{ '[' + m['content'] | trim + eos_token }}"
    + END,
    "tools": "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    + EVERY
    + "{% for call in m.tool_calls %}{% if call.function is defined %}"
    "{% set call = call.function %}{% endif %}{{ call.name }}{{ call.arguments | tojson }}"
    "{% endfor %}" + END,
    "neighbours": EVERY
    + "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<u>{% endif %}{{ m.content }}"
    + END,
    "reasoning": "{% set ns = namespace(last=messages|length - 1) %}{% for m in messages[::-1] %}"
    "{% set index = (messages|length - 1) - loop.index0 %}{% if m.role == 'user' %}"
    "{% set ns.last = index %}{% endif %}{% endfor %}"
    + EVERY
    + "{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ content }}{% endif %}" + END,
    "first": EVERY + "{% set content = '<' + m.role + '>' + m.content %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}" + END,
}

COSTLY = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * k }}",
    "power": "{{ 2 ** k }}",
    "width": "{{ messages[0].content % 5 }}",
    "format": "{{ '%s' | format(k) }}",
    "ljust": "{{ messages[0].content.ljust(1000000000) }}",
    "center": "{{ 'a' | center(k) }}",
    "indent": "{{ tools | tojson(indent=1000000000) }}",
    "map": "{{ messages | map('indent', 5) | list }}",
    "attribute": "{{ '' | attr('ljust') }}",
    "method by item": "{{ messages[0]['content']['zfill'](k) }}",
    "replace": "{{ messages[0].content.replace('', k) }}",
    "join": "{{ messages | join(k) }}",
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "recursion": "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "block": "{% set x %}{{ k }}{{ k }}{% endset %}{{ x }}",
    "doubling": "{% set ns = namespace(x='a') %}"
    + EVERY + "{% set ns.x = ns.x ~ ns.x %}" + END + "{{ ns.x }}",
    "doubling by two": "{% set ns = namespace(x='a', y='') %}"
    + EVERY + "{% set ns.y = ns.x %}{% set ns.x = ns.y + ns.y %}" + END,
    "doubling a list": "{% set ns = namespace(l=[]) %}"
    + EVERY + "{% set ns.l = ns.l + ns.l + [m] %}" + END,
    "doubling by hand": "{% set a = k %}" + "{% set a = a ~ a %}" * 30 + "{{ a }}",
    "chain": "{% set a = k + k %}{% set b = a + a %}{{ b }}",
    "all for each": EVERY + "{% for k in messages %}{{ k.content }}{% endfor %}" + END,
    "all in each": EVERY + "{{ messages | tojson }}" + END,
    "all by name": "{% set a = messages | tojson %}" + EVERY + "{{ a }}" + END,
    "all carried": "{% set ns = namespace(x='') %}"
    + EVERY + "{% set ns.x = ns.x ~ m.content %}{{ ns.x }}" + END,
    "one for each of its letters": EVERY
    + "{% for c in m.content %}{{ m.content }}{% endfor %}" + END,
    "all looked at": EVERY + "{% if (messages | tojson) is string %}{% endif %}" + END,
    "all searched": EVERY + "{% if 'a' in messages[0].content %}{% endif %}" + END,
    "all filtered": "{% for m in messages if m.content in messages[0].content %}{% endfor %}",
    "no syntax": "{% for %}",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_what_usual_templates_do_is_cheap(name: str) -> None:
    assert is_cheap(CHEAP[name])


@pytest.mark.parametrize("name", COSTLY)
def test_what_may_grow_is_not(name: str) -> None:
    assert not is_cheap(COSTLY[name])
