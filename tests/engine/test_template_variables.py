"""What a chat template reads from outside, told without running any of it."""

from __future__ import annotations

import time

import pytest

from autotp_serving.engine.template_variables import list_variables


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages"}),
        ("{% set thinking = true %}{{ thinking }}", set()),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", {"thinking"}),
        ("{% if enable_thinking is defined and not enable_thinking %}x{% endif %}",
         {"enable_thinking"}),
        ("{% broken", set()),
        ("{{ " + "(" * 5000, set()),
    ],
)  # fmt: skip
def test_variables(source: str, expected: set[str]) -> None:
    assert list_variables(source) == expected


def test_no_part_of_a_template_is_worked_out() -> None:
    started = time.monotonic()
    assert list_variables("{{ '%9999999999d' % 1 }}{{ 9 ** 9 ** 9 }}{{ x }}") == {"x"}
    assert time.monotonic() - started < 1.0
