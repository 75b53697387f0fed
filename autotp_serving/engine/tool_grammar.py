"""The part of a grammar that holds tool calls to a form, in llguidance's Lark. Rank 0 only.

A call is written as the models' chat templates show it (`tool_formats`), so that there is one way
to write it.
"""

from __future__ import annotations

import json
from typing import Any

from autotp_serving.engine.argument_grammar import ArgumentRules
from autotp_serving.engine.json_schema import close_objects
from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES
from autotp_serving.engine.tool_formats import TOOL_SYNTAXES, ToolSyntax
from autotp_serving.structured_output import CallableTool, ToolCalls

LLAMA_TAG = "<|python_tag|>"
"""A special token of Llama 3 that may come before its calls."""

FREE_TEXT = r"TEXT: /(.|\n)*/"
NO_CALL = r"TEXT: /[ \t\n]*([^ \t\n{](.|\n)*)?/"
"""In Llama 3's format a completion that begins with a brace is a call."""

INDEX = "/[0-9]{1,3}/"


def write_calls(
    calls: ToolCalls, *, has_content: bool, has_llama_tag: bool
) -> tuple[str, list[dict[str, Any]]]:
    """Rules of a completion with calls, and the grammars that they refer to.

    Args:
        has_content: a completion without calls has a form too, `@content`.
        has_llama_tag: the vocabulary has Llama 3's special token.

    Raises:
        ValueError: for what a tool that is strict cannot be held to.
    """
    syntax = TOOL_SYNTAXES[calls.tool_format]
    is_harmony = calls.tool_format == "harmony"  # whose calls end a completion
    is_single = calls.is_single or is_harmony
    answer = _literal(REASONING_SYNTAXES["harmony"].answer if is_harmony else "")
    rules: list[str] = []
    grammars: list[dict[str, Any]] = []
    bodies = []
    for number, tool in enumerate(calls.tools):
        body, found, more = _write_body(syntax, number, tool)
        bodies.append(body)
        rules += found
        grammars += more
    # What comes before all bodies alike stands outside of them, for the tag to be found in a text.
    before, after = _around(syntax)
    rules.append(f"body: {' | '.join(bodies)}")
    rules.append(f"one: {_literal(before)} body {_literal(after)}")
    is_section = bool(syntax.begin) or not syntax.open
    many = "one"
    if not is_single:
        many = f"one ({_literal(syntax.separator)} one)*"
    if is_section:
        rest = f"{_literal(syntax.begin.removeprefix(syntax.open))} {many} {_literal(syntax.end)}"
        rules += [f"rest: {rest}", f"calls: {_literal(syntax.open)} rest"]
    else:
        rules += ["rest: one", f"call: {_literal(syntax.open)} rest"]
        separator = _literal(syntax.separator)
        rules.append("calls: call" if is_single else f"calls: call ({separator} call)*")
    if calls.is_required:
        start = "calls"
    elif has_content:
        start = f"calls | {answer} @content"
    elif calls.tool_format == "harmony":
        rules.append(FREE_TEXT)
        start = f"calls | {answer} TEXT"
    elif syntax.open:
        # Lazy: once the tag is there, the text before it is over.
        rules += [FREE_TEXT, f"opening[lazy]: TEXT {_literal(syntax.open)}"]
        start = "opening rest | TEXT" if is_single else "(opening rest)* TEXT"
    else:
        rules.append(NO_CALL)
        start = f"{LLAMA_TAG}? calls | TEXT" if has_llama_tag else "calls | TEXT"
    return "\n".join([f"start: {start}", *rules]), grammars


def _around(syntax: ToolSyntax) -> tuple[str, str]:
    """What stands before the bodies of all calls, the opening tag left out, and after them."""
    before = syntax.before_name if "{name}" in syntax.call else syntax.call.partition("{object}")[0]
    if not syntax.begin:
        before = before.removeprefix(syntax.open)
    return before, syntax.after


def _write_body(
    syntax: ToolSyntax, number: int, tool: CallableTool
) -> tuple[str, list[str], list[dict[str, Any]]]:
    """A call from its name to its arguments; rules and grammars that it refers to."""
    # A blank at most between JSON tokens: nobody reads arguments, each of them costs a step.
    guidance: dict[str, Any] = {"whitespace_pattern": r"\x20"}
    if not tool.is_strict:
        guidance["lenient"] = True
    schema: dict[str, Any] = close_objects(json.loads(tool.schema))
    grammar = {"name": f"arguments_{number}", "json_schema": schema | {"x-guidance": guidance}}
    if syntax.kind == "object":
        # JSON token by JSON token: in one piece, the head would win over an object that is content.
        texts = ["{", '"name"', ":", " ", json.dumps(tool.name), ",", " ", f'"{syntax.key}"', ":",
                " "]  # fmt: skip
        return f'{" ".join(map(_literal, texts))} @arguments_{number} "}}"', [], [grammar]
    between = f" {INDEX} ".join(map(_literal, syntax.between.split("{index}")))
    head = f"{_literal(tool.name)} {between}"
    if syntax.kind == "json":
        return f"{head} @arguments_{number}", [], [grammar]
    written = ArgumentRules(syntax, number, schema, guidance, is_strict=tool.is_strict)
    return f"{head} arguments_{number}", written.rules, written.grammars


def _literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)
