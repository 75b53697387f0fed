"""Calls that a grammar forces are those that the parser of the same format reads, for each one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer

from autotp_serving.api.openai.completion_parser import join
from autotp_serving.api.openai.harmony import HarmonyParser
from autotp_serving.api.openai.tool_calls import ToolCallParser
from autotp_serving.engine import grammar
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.engine.tool_formats import TOOL_SYNTAXES
from autotp_serving.engine.vocabulary import Vocabulary
from autotp_serving.structured_output import CallableTool, StructuredOutput, ToolCalls, ToolFormat
from tests.api.tool_families import FAMILIES, WEATHER
from tests.api.tool_families import TOOLS as FAMILY_TOOLS
from tests.fakes import ByteTokenizer
from tests.generated_schemas import check

DEMO = Path(__file__).parents[2] / "demo_model"
TOOL_FORMATS = pytest.mark.parametrize("tool_format", get_args(ToolFormat))
MAX_BYTES = 5000
SHORT = {"type": "string", "maxLength": 3}
OBJECT = {"type": "object", "additionalProperties": False}
POINT = OBJECT | {
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "name": SHORT},
    "required": ["x"],
}


def make_tools(point: dict[str, Any]) -> dict[str, dict[str, Any]]:
    properties = {
        "maybe": {"type": "boolean"},
        "text": SHORT,
        "size": {"enum": ["S", "M", 'X"L']},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "both": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 5}]},
        "list": {"type": "array", "items": point, "maxItems": 2},
        "point": point,
        "last": {"enum": [1, 2.5, None]},
    }
    whole = {"properties": properties, "required": ["text", "size", "list", "point"]}
    return {"all": OBJECT | whole, "nothing": OBJECT | {"properties": {}}}


CHECKED = make_tools(POINT)
TOOLS = make_tools({"$ref": "#/$defs/Point"})
TOOLS["all"]["$defs"] = {"Point": POINT}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(ByteTokenizer())


def compile_calls(vocabulary: Vocabulary, calls: ToolCalls) -> Any:
    text = grammar.write_structure(StructuredOutput("text", calls=calls), vocabulary)
    matcher, _ = grammar.compile_text(vocabulary, text)
    return matcher


def callables(tools: dict[str, Any], *, is_strict: bool = True) -> tuple[CallableTool, ...]:
    return tuple(CallableTool(name, json.dumps(one), is_strict) for name, one in tools.items())


def wander(matcher: Any, rng: random.Random) -> str:
    """Some completion that a grammar allows."""
    written = bytearray()
    while len(written) < MAX_BYTES:
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        # Letters rather than halves of others, which may not come together.
        allowed = [token for token in range(128) if bits >> token & 1]
        allowed = allowed or [token for token in range(256) if bits >> token & 1]
        if bits >> ByteTokenizer.EOS & 1 and (not allowed or rng.random() < 0.5):
            break
        written.append(rng.choice(allowed))
        assert matcher.consume_token(written[-1])
    return written.decode()


def read(tool_format: ToolFormat, tools: Any, text: str) -> dict[str, Any]:
    parser = (
        HarmonyParser(tools) if tool_format == "harmony" else ToolCallParser(tool_format, tools)
    )
    return join([*parser.add(text), *parser.end()])


@TOOL_FORMATS
@pytest.mark.parametrize("is_single", [True, False])
def test_whatever_is_forced_is_read_and_fits(
    tool_format: ToolFormat, is_single: bool, vocabulary: Vocabulary
) -> None:
    calls = ToolCalls(tool_format, callables(TOOLS), is_required=True, is_single=is_single)
    matcher = compile_calls(vocabulary, calls)
    names = set()
    for seed in range(8):
        text = wander(matcher.deep_copy(), random.Random(seed))
        message = read(tool_format, TOOLS, text)
        assert not message["content"], text
        assert len(message["tool_calls"]) == 1 or not is_single
        for call in message["tool_calls"]:
            names.add(call["function"]["name"])
            arguments = json.loads(call["function"]["arguments"])
            check(CHECKED[call["function"]["name"]], arguments)
    assert names == set(TOOLS)


@TOOL_FORMATS
def test_what_models_write_by_themselves_is_allowed(
    tool_format: ToolFormat, vocabulary: Vocabulary
) -> None:
    """Text, then the family's own calls: a strict tool is no reason to write otherwise."""
    calls = ToolCalls(tool_format, callables(FAMILY_TOOLS))
    matcher = compile_calls(vocabulary, calls)
    said = {"llama3": "", "harmony": ""}.get(tool_format, "I look.\n")
    # Up to the second one, which some samples write as a parser would have it, and no grammar.
    text = (said + FAMILIES[tool_format].calls).partition("<|end|>")[0]
    num_accepted = matcher.deep_copy().try_consume_tokens(list(text.encode()))
    first = text.encode()[:num_accepted].decode("utf-8", "ignore")
    assert first == text or len(first) >= text.index("add") - len("<function=")
    calls = read(tool_format, FAMILY_TOOLS, first)["tool_calls"]
    assert json.loads(calls[0]["function"]["arguments"]) == WEATHER
    free = "I would <rather> not {call}."
    if tool_format == "harmony":
        free = f"<|channel|>final<|message|>{free}"
    assert matcher.try_consume_tokens(list(free.encode())) == len(free)
    assert matcher.is_accepting()


@pytest.mark.parametrize("tool_format", ["qwen3_coder", "gemma4"])
def test_what_cannot_be_held_is_refused_for_strict_tools_only(
    tool_format: ToolFormat, vocabulary: Vocabulary
) -> None:
    tools = {"f": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a"}}}}
    with pytest.raises(grammar.GrammarError, match="'pattern' of a text"):
        compile_calls(vocabulary, ToolCalls(tool_format, callables(tools), is_required=True))
    loose = ToolCalls(tool_format, callables(tools, is_strict=False), is_required=True)
    compile_calls(vocabulary, loose)


@pytest.mark.parametrize("tool_format", ["glm45", "functiongemma"])
def test_schemas_without_an_end_or_a_form(tool_format: ToolFormat, vocabulary: Vocabulary) -> None:
    loop = {"type": "object", "properties": {"a": {"$ref": "#/$defs/Loop"}}, "required": ["a"],
            "$defs": {"Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]}}}  # fmt: skip
    broken = {"type": "object", "properties": {"a": {"type": 5, "minItems": "x"}}}
    for schema in (loop, broken) if tool_format == "functiongemma" else ():
        calls = ToolCalls(tool_format, callables({"f": schema}), is_required=True)
        with pytest.raises(grammar.GrammarError):
            compile_calls(vocabulary, calls)
    free = {"f": {"type": "object"}, "g": {"properties": {"a": {}, "b": {"type": "object"}}}}
    calls = ToolCalls(tool_format, callables(free, is_strict=False), is_required=True)
    matcher = compile_calls(vocabulary, calls)
    text = {
        "glm45": "<tool_call>g\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n"
        '<arg_key>b</arg_key>\n<arg_value>{"c": [1]}</arg_value>\n</tool_call>',
        "functiongemma": "<start_function_call>call:g{a:<escape>x<escape>,b:{c:[1]}}"
        "<end_function_call>",
    }[tool_format]
    assert matcher.try_consume_tokens(list(text.encode())) == len(text)
    (call,) = read(tool_format, free, text)["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "x", "b": {"c": [1]}}


@pytest.mark.parametrize("tool_format", ["hermes", "mistral", "deepseek_v31", "gemma4", "harmony"])
def test_tags_that_are_single_tokens_are_text_and_begin_a_call(
    tool_format: ToolFormat, tmp_path: Path
) -> None:
    """As the families' own tokenizers have them, marked as special."""
    syntax = TOOL_SYNTAXES[tool_format]
    outer = AutoTokenizer.from_pretrained(DEMO)
    outer.chat_template = FAMILIES[tool_format].template
    outer.add_special_tokens({"additional_special_tokens": [syntax.open]})
    outer.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    tag = outer.convert_tokens_to_ids(syntax.open)
    assert tokenizer.decode([tag]) == syntax.open
    vocabulary = Vocabulary.of(tokenizer)
    tool = CallableTool("f", '{"type": "object"}', is_strict=False)
    calls = StructuredOutput("text", calls=ToolCalls(tool_format, (tool,), is_required=True))
    matcher, mask = grammar.compile_text(vocabulary, grammar.write_structure(calls, vocabulary))
    assert mask[tag // 8] >> tag % 8 & 1
    assert matcher.consume_token(tag)
