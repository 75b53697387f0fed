"""Reasoning and tool calls in a text, however it is cut into pieces."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest

from autotp_serving.api.openai.reasoning import ThinkSplitter
from autotp_serving.api.openai.tool_calls import ToolCallParser, find_format

NAMES = ("weather", "add")


def cuts(text: str) -> list[list[str]]:
    """The text whole, by characters, and cut at random places."""
    ways = [[text], list(text)]
    rng = random.Random(text)
    for _ in range(20):
        places = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 8)))
        ends = [0, *places, len(text)]
        ways.append([text[a:b] for a, b in pairwise(ends)])
    return ways


def split(pieces: list[str], **options: Any) -> tuple[str, str]:
    splitter = ThinkSplitter(**options)
    parts = [splitter.add(piece) for piece in pieces] + [splitter.end()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nHm, 2 + 2.\n</think>\n\nIt is 4.\n", ("Hm, 2 + 2.", "It is 4.\n")),
        ("\n<think>a\n\nb</think>c", ("a\n\nb", "c")),
        ("<think></think>c", ("", "c")),
        ("  plain answer ", ("", "  plain answer ")),
        ("say <think>x</think>", ("", "say <think>x</think>")),
        ("<thin", ("", "<thin")),
        ("<think>cut off </thi", ("cut off </thi", "")),
        ("<think>a < b </think>a<think>b</think>", ("a < b", "a<think>b</think>")),
        ("", ("", "")),
    ],
)
def test_reasoning(text: str, expected: tuple[str, str]):
    for pieces in cuts(text):
        assert split(pieces) == expected, pieces


def test_reasoning_whose_opening_is_in_the_prompt():
    for pieces in cuts("Hm.\n</think>\nYes."):
        assert split(pieces, starts_inside=True) == ("Hm.", "Yes.")


def parse(tool_format: str, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls, put together as a client does."""
    parser = ToolCallParser(tool_format, NAMES, **options)
    deltas = [delta for piece in pieces for delta in parser.add(piece)] + parser.end()
    text, calls, ids = "", [], []
    for delta in deltas:
        text += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls) and call["type"] == "function"
                ids.append(call["id"])
                calls.append([call["function"]["name"], call["function"]["arguments"]])
            else:
                calls[call["index"]][1] += call["function"]["arguments"]
    assert len(set(ids)) == len(ids)
    return text, [tuple(call) for call in calls]


WEATHER = '{"city": "K\\"ö{ln", "days": [1, {"a": "}"}]}'
ADD = '{"a": 1}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>'
HERMES_ADD = f'<tool_call>{{"arguments": {ADD}, "name": "add"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text <b> {", ("just text <b> {", [])),
        (HERMES, ("", [("weather", WEATHER)])),
        (f"Let me see.\n{HERMES}\n", ("Let me see.", [("weather", WEATHER)])),
        (f"{HERMES}\n{HERMES_ADD}", ("", [("weather", WEATHER), ("add", ADD)])),
        ('<tool_call>{"name": "other", "arguments": {}}', None),
        ("<tool_call>no json</tool_call>", None),
        ("<tool_call>", None),
        ("a <tool", ("a <tool", [])),
    ],
)
def test_hermes(text: str, expected: Any):
    for pieces in cuts(text):
        assert parse("hermes", pieces) == (expected or (text, [])), pieces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is {fine}; really.", ("It is {fine}; really.", [])),
        (f'{{"name": "weather", "parameters": {WEATHER}}}', ("", [("weather", WEATHER)])),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', ("", [("add", ADD)])),
        (
            '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}',
            ("", [("add", ADD), ("add", ADD)]),
        ),
        ('{"just": "json"} and text', ('{"just": "json"} and text', [])),
        ('{"name": "other", "parameters": {}}', ('{"name": "other", "parameters": {}}', [])),
        ("<|pyth", ("<|pyth", [])),
    ],
)
def test_llama3(text: str, expected: Any):
    for pieces in cuts(text):
        assert parse("llama3", pieces) == expected, pieces


def test_arguments_stream_while_they_come():
    parser = ToolCallParser("hermes", NAMES)
    begin = parser.add('<tool_call>{"name": "add", "arguments": {"a"')
    assert begin[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": ""}
    assert begin[1]["tool_calls"][0]["function"] == {"arguments": '{"a"'}
    assert parser.add(": 1}")[0]["tool_calls"][0]["function"] == {"arguments": ": 1}"}
    assert parser.add("}</tool_call>") == []
    assert parser.num_calls == 1


def test_a_call_cut_off_by_the_length_keeps_what_came():
    text, calls = parse("hermes", ['<tool_call>{"name": "add", "arguments": {"a": 1, "b'])
    assert (text, calls) == ("", [("add", '{"a": 1, "b')])


def test_one_call_only_where_no_parallel_ones_are_wanted():
    for pieces in cuts(f"{HERMES}\n{HERMES_ADD}"):
        assert parse("hermes", pieces, max_calls=1) == ("", [("weather", WEATHER)])


def test_arguments_given_as_text_are_taken_as_they_are():
    text = json.dumps({"name": "add", "arguments": ADD})
    assert parse("hermes", [f"<tool_call>{text}</tool_call>"]) == ("", [("add", ADD)])


def test_the_chat_template_tells_the_format():
    assert find_format("... <tool_call>\n ...") == "hermes"
    assert find_format("... <|python_tag|> ...") == "llama3"
    assert find_format("{{ messages }}") is None
