"""Reasoning and tool calls in a text, however it is cut into pieces."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any, get_args

import pytest

from autotp_serving.api.openai.completion_parser import CompletionParsers, join
from autotp_serving.api.openai.harmony import HarmonyParser
from autotp_serving.api.openai.reasoning import ThinkSplitter
from autotp_serving.api.openai.tool_calls import ToolCallParser
from autotp_serving.config import ServingConfig
from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES, find_reasoning_format
from autotp_serving.engine.tool_formats import find_formats
from autotp_serving.structured_output import ReasoningFormat, ToolFormat
from tests.api.tool_families import ADD, ADD_JSON, FAMILIES, TOOLS, WEATHER
from tests.fakes import ByteTokenizer


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


def parse(
    tool_format: ToolFormat, pieces: list[str], tools: Any = TOOLS, **options: Any
) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls, put together as a client does."""
    if tool_format == "harmony":
        parser = HarmonyParser(tools, **options)
    else:
        parser = ToolCallParser(tool_format, tools, **options)
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


CITY = '{"city": "K\\"ö{ln", "days": [1, {"a": "}"}]}'
ONE = '{"a": 1}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
HERMES_ADD = f'<tool_call>{{"arguments": {ONE}, "name": "add"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text <b> {", ("just text <b> {", [])),
        (HERMES, ("", [("weather", CITY)])),
        (f"Let me see.\n{HERMES}\n", ("Let me see.", [("weather", CITY)])),
        (f"{HERMES}\n{HERMES_ADD}", ("", [("weather", CITY), ("add", ONE)])),
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
        (f'{{"name": "weather", "parameters": {CITY}}}', ("", [("weather", CITY)])),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', ("", [("add", ONE)])),
        (
            '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}',
            ("", [("add", ONE), ("add", ONE)]),
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
    parser = ToolCallParser("hermes", TOOLS)
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
        assert parse("hermes", pieces, max_calls=1) == ("", [("weather", CITY)])


def test_arguments_given_as_text_are_taken_as_they_are():
    text = json.dumps({"name": "add", "arguments": ONE})
    assert parse("hermes", [f"<tool_call>{text}</tool_call>"]) == ("", [("add", ONE)])


TOOL_FORMATS = pytest.mark.parametrize("tool_format", get_args(ToolFormat))
BOTH = [("weather", WEATHER), ("add", ADD)]


def every_cut(text: str) -> list[list[str]]:
    """The text in two pieces, cut at every place, and in the ways of `cuts`."""
    return [*cuts(text), *([text[:place], text[place:]] for place in range(len(text)))]


def read_calls(calls: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@TOOL_FORMATS
def test_a_format_is_recognized_and_taken_for_no_other(tool_format: ToolFormat) -> None:
    assert find_formats(FAMILIES[tool_format].template) == [tool_format]


def test_other_templates_teach_no_format() -> None:
    assert find_formats("{{ messages }}") == []
    assert find_formats('"parameters": dictionary of argument name') == ["llama3"]


@TOOL_FORMATS
def test_calls_of_each_family(tool_format: ToolFormat) -> None:
    """Two at once, after some text, whole and streamed, the same however they are cut."""
    written = FAMILIES[tool_format].calls
    said = "" if tool_format in ("llama3", "harmony") else "I look\nthem up.\n"
    whole = parse(tool_format, [said + written])
    assert (whole[0], read_calls(whole[1])) == (said.rstrip(), BOTH)
    for pieces in every_cut(said + written):
        assert parse(tool_format, pieces) == whole, pieces
    alone = parse(tool_format, [written], max_calls=1)
    assert ("", BOTH[:1]) == (alone[0], read_calls(alone[1]))


@TOOL_FORMATS
def test_what_is_no_call_of_a_family_stays_text(tool_format: ToolFormat) -> None:
    text = "One moment, " + FAMILIES[tool_format].malformed + " and so on."
    if tool_format == "llama3":
        text = FAMILIES[tool_format].malformed + " and so on."
    if tool_format == "harmony":
        text = FAMILIES[tool_format].malformed
    for pieces in every_cut(text):
        assert parse(tool_format, pieces) == (text, []), pieces


@TOOL_FORMATS
def test_what_is_cut_off_is_the_same_in_a_stream(tool_format: ToolFormat) -> None:
    """At every place: the beginning of what would have come, and no error."""
    written = FAMILIES[tool_format].calls
    for end in range(0, len(written), 3):
        whole = parse(tool_format, [written[:end]])
        assert parse(tool_format, list(written[:end])) == whole
        names = [name for name, _ in whole[1]]
        assert names == ["weather", "add"][: len(names)]


@TOOL_FORMATS
def test_a_call_is_followed_by_text(tool_format: ToolFormat) -> None:
    written = FAMILIES[tool_format].calls
    text = f"{written}\nDone, I think."
    if tool_format == "harmony":
        text = f"{written}<|end|><|start|>assistant<|channel|>final<|message|>Done, I think."
    for pieces in cuts(text):
        said, calls = parse(tool_format, pieces)
        assert (said, read_calls(calls)) == ("Done, I think.", BOTH), pieces


def test_a_call_that_calls_are_numbered_by_keeps_its_id() -> None:
    parser = ToolCallParser("kimi_k2", TOOLS)
    ids = [
        call["id"]
        for delta in parser.add(FAMILIES["kimi_k2"].calls)
        for call in delta["tool_calls"]
        if "id" in call
    ]
    assert ids == ["functions.weather:0", "functions.add:1"]
    twice = FAMILIES["kimi_k2"].calls.replace("functions.add:1", "functions.weather:0")
    parse("kimi_k2", [twice])  # where a model does not count, ids differ all the same


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        (" 5.0\n", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("five", {"type": "integer"}, "five"),
        ("True", {"type": "boolean"}, True),
        ("{'a': [True, None]}", {"type": "object"}, {"a": [True, None]}),
        ('{"a": 1}', {"type": ["object", "null"]}, {"a": 1}),
        ("{1, 2}", {"type": "object"}, "{1, 2}"),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
        ("null", {"type": "string"}, "null"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ('"a"', {"type": ["string", "null"]}, '"a"'),
        ("2", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, 2),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {}, "2"),
        ("2", {"$ref": "#/$defs/Loop"}, "2"),
        ("2", {"anyOf": [{"$ref": "#/properties/a"}] * 9 + [{"type": "integer"}]}, 2),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_values_between_tags_get_the_types_of_the_schema(
    text: str, schema: dict[str, Any], value: Any
) -> None:
    tools = {"f": {"properties": {"a": schema}, "$defs": {"Loop": {"$ref": "#/$defs/Loop"}}}}
    written = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    for pieces in ([written], list(written)):
        ((_, arguments),) = parse("glm45", pieces, tools=tools)[1]
        assert json.loads(arguments) == {"a": value}


def test_texts_between_tags_stream_while_they_come() -> None:
    parser = ToolCallParser("qwen3_coder", TOOLS)
    begin = parser.add("<tool_call>\n<function=weather>\n<parameter=city>\nKö")
    pieces = [delta["tool_calls"][0]["function"]["arguments"] for delta in begin]
    assert "".join(pieces) == '{"city": "Kö'
    (delta,) = parser.add('"ln\n</par')
    assert delta["tool_calls"][0]["function"]["arguments"] == '\\"ln'


def test_channels_of_gpt_oss() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.\n<|end|><|start|>assistant<|channel|>analysis<|message|>"
        "Well.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>"
        f"assistant to=functions.add<|channel|>commentary json<|message|>{ADD_JSON}<|end|><|start|>"
        "assistant<|channel|>final<|message|>Done <|.\n"
    )
    for pieces in cuts(text):
        parser = HarmonyParser(TOOLS)
        message = join([one for piece in pieces for one in parser.add(piece)] + parser.end())
        assert message["reasoning_content"] == "Hm.\n\nWell."
        assert message["content"] == "I look.\nDone <|.\n"
        ((call),) = message["tool_calls"]
        assert call["function"] == {"name": "add", "arguments": ADD_JSON}
    for text in ("Plain <text>.", "<|channel|>" + "x" * 600, " to=nobody", "to " * 300):
        for pieces in cuts(text):
            assert parse("harmony", pieces) == (text, [])
    for text in ("", "<|channel|>fin", "<|start|>assistant"):  # nothing was said
        assert parse("harmony", [text]) == ("", [])


def test_reasoning_and_calls_of_two_families() -> None:
    config = ServingConfig(model_path="fake", reasoning_parser="think", tool_call_parser="harmony")
    parser = CompletionParsers(ByteTokenizer(), config).make("begun", TOOLS, None)
    message = join(parser.add(f"Hm.</think>{FAMILIES['harmony'].calls}", is_last=True))
    assert message["reasoning_content"] == "Hm."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "add"]


@pytest.mark.parametrize("name", get_args(ReasoningFormat))
def test_reasoning_of_each_family(name: ReasoningFormat) -> None:
    syntax = REASONING_SYNTAXES[name]
    assert find_reasoning_format(f"{syntax.open} {syntax.close}") == name
    text = f"{syntax.open}\nHm.{syntax.close}{syntax.next}{syntax.answer}Yes."
    for pieces in every_cut(text):
        parser = CompletionParsers(
            ByteTokenizer(), ServingConfig(model_path="fake", reasoning_parser=name)
        ).make("possible", {}, None)
        message = join([delta for piece in pieces for delta in parser.add(piece, is_last=False)]
                       + parser.add("", is_last=True))  # fmt: skip
        assert (message["reasoning_content"].strip(), message["content"]) == ("Hm.", "Yes.")
