"""What templates expect of earlier turns, and the forms of a conversation that are tried."""

from __future__ import annotations

import time
from typing import Any

import pytest

from autotp_serving.engine.chat_history import list_forms, put_tools, write_tools
from autotp_serving.engine.chat_template import ChatTemplate
from autotp_serving.engine.template_habits import TemplateHabits, find_habits

CALL = {"id": "a-1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def first_form(messages: list[Any], **habits: Any) -> list[dict[str, Any]]:
    return next(list_forms(messages, TemplateHabits(**habits)))


@pytest.mark.parametrize(
    ("source", "habits"),
    [
        ("{{ c.arguments | tojson }}", {}),
        ("{% for k, v in c['arguments'].items() %}{% endfor %}", {}),
        ("{% set a = c.function.arguments %}{% for k in a %}{{ a[k] }}{% endfor %}", {}),
        ("{{ c.function | tojson }}", {}),
        ("{{ '<' + c['arguments'] }}", {"arguments_are_text": True}),
        ("{{ '<' ~ c.arguments }}", {"arguments_are_text": True}),
        ("{{ c.arguments }}", {"arguments_are_text": True}),
        ("{% set a = c.arguments %}{{ a }}", {"arguments_are_text": True}),
        ("{{ c.arguments if c.arguments is string else c.arguments | tojson }}",
         {"takes_text": True}),
        ("{% if m['content'] is none %}{% endif %}", {"tests_none": True}),
        ("{% if c.id | length != 9 %}{% endif %}", {"wants_short_ids": True}),
        ("{{ m.thinking }}", {"reasoning_key": "thinking"}),
        ("{{ m['tools'] }}", {"reads_tools_of_message": True}),
        ("{{ m['tools'] or tools }}", {}),
        ("{{ m['reasoning_content'] }}{{ m.reasoning }}", {}),
        ("{% generation %}{{ '' + c.arguments }}{%- endgeneration -%}",
         {"arguments_are_text": True}),
        ("{% if %}", {}),
        ("{{ " + "(" * 10_000, {}),
    ],
)  # fmt: skip
def test_what_a_template_expects(source: str, habits: dict[str, Any]) -> None:
    # The comment says that it writes calls.
    assert find_habits(f"{{# tool_calls #}}{source}") == TemplateHabits(**habits)


def test_a_template_without_calls() -> None:
    assert not find_habits("{{ messages[0].content }}").writes_calls


@pytest.mark.parametrize(
    ("arguments", "shown", "text"),
    [
        ('{"x": 1}', {"x": 1}, '{"x": 1}'),
        ({"x": 1}, {"x": 1}, '{"x": 1}'),
        ("", {}, "{}"),
        (" \n", {}, "{}"),
        (None, {}, "{}"),
        ('{"x": "ab', {}, '{"x": "ab'),
        ("[1]", {}, "[1]"),
        ("[" * 100_000, {}, "[" * 100_000),
    ],
    ids=lambda value: str(value)[:12],
)
def test_arguments(arguments: Any, shown: Any, text: str) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]

    def see(**habits: Any) -> Any:
        return first_form(messages, **habits)[0]["tool_calls"][0]["function"]["arguments"]

    assert see() == shown
    assert see(arguments_are_text=True) == text
    assert see(takes_text=True) == (shown if shown or text == "{}" else text)
    assert call["function"]["arguments"] == arguments  # the client's own is left alone


def test_what_is_missing_is_filled_in() -> None:
    function = {"name": "f", "arguments": ""}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [
            {"function": function}, {"id": "b", "function": function | {"name": "g"}}]},
        {"role": "tool", "content": "of b", "tool_call_id": "b"},
        {"role": "tool", "content": "of the first"},
        {"role": "assistant", "content": None},
    ]  # fmt: skip
    caller, first, second, last = first_form(messages, wants_short_ids=True)
    ids = [call["id"] for call in caller["tool_calls"]]
    assert all(len(one) == 9 and one.isalnum() for one in ids) and len(set(ids)) == 2
    assert "content" not in caller
    assert (first["content"], first["name"], first["tool_call_id"]) == ("of the first", "f", ids[0])
    assert (second["content"], second["name"], second["tool_call_id"]) == ("of b", "g", ids[1])
    assert last == {"role": "assistant", "content": ""}
    assert first_form(messages, tests_none=True)[0]["content"] is None


def test_forms_come_closest_first_and_differ() -> None:
    system = {"role": "system", "content": "s"}
    user = {"role": "user", "content": "u"}
    caller = {"role": "assistant", "content": "c", "tool_calls": [CALL, CALL | {"id": "b"}]}
    result = {"role": "tool", "tool_call_id": "b", "content": "r"}
    forms = list(list_forms([user, user, caller, result, user, system], TemplateHabits()))
    roles = ["".join(one["role"][0] for one in form) for form in forms]
    assert roles == ["uuatus", "uuaatus", "suuaatu", "suaatau", "suaatau"]
    assert forms[3][1]["content"] == "u\n\nu"
    assert forms[3][5] == {"role": "assistant", "content": ""}
    assert forms[4][2]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'
    assert len(list(list_forms([system, user], TemplateHabits()))) == 1
    assert list(list_forms(["no message"], TemplateHabits())) == [["no message"]]


def test_tools_in_the_system_message() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    user = {"role": "user", "content": "u"}
    system = {"role": "system", "content": "s"}
    told = {"tools": '[{"name": "f"}]'}
    assert put_tools([user], [tool]) == [system | {"content": ""} | told, user]
    assert put_tools([system, user], [tool]) == [system | told, user]
    source = "{% for m in messages %}{{ m.role }} {{ m['tools'] }}{% endfor %}"
    options = {"tools": [tool], "add_generation_prompt": False}
    assert '[{"name": "f"}]' in ChatTemplate({"default": source}, {}).render([user], options)


def test_tools_are_told_in_the_first_words() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    user = {"role": "user", "content": "u"}
    (told,) = write_tools([user], [tool])
    assert told["content"].endswith("\n\nu") and '"name": "f"' in told["content"]
    assert write_tools([{"role": "assistant", "content": "a"}], [tool])[0]["role"] == "user"
    assert user["content"] == "u"


@pytest.mark.parametrize("habits", [{}, {"writes_calls": False}, {"wants_short_ids": True}])
def test_work_grows_with_the_conversation_and_no_faster(habits: dict[str, Any]) -> None:
    num = 16_000
    calls = [CALL | {"id": str(number)} for number in range(num)]
    results = [{"role": "tool", "tool_call_id": str(num - n), "content": "r"} for n in range(num)]
    started = time.process_time()
    for messages in (
        [{"role": "assistant", "tool_calls": calls}, *results],
        [{"role": "user", "content": "a" * 60}] * num,
        [{"role": "tool", "content": "a" * 60}] * num,
    ):
        for _ in list_forms(messages, TemplateHabits(**habits)):
            pass
    assert time.process_time() - started < 10  # half a second here; squares would take minutes
