"""The part of a grammar that holds tool calls to a form, in llguidance's Lark. Rank 0 only.

A call is written as the models' chat templates show it, so that there is one way to write it:

    hermes  <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>
    llama3  {"name": "f", "parameters": {...}}; {"name": ...}
"""

from __future__ import annotations

import json
from typing import Any

from autotp_serving.engine.json_schema import close_objects
from autotp_serving.structured_output import CallableTool, ToolCalls

HERMES_TAG = "<tool_call>"
LLAMA_TAG = "<|python_tag|>"
"""A special token of Llama 3 that may come before its calls."""

FREE_TEXT = r"TEXT: /(.|\n)*/"
NO_CALL = r"TEXT: /[ \t\n]*([^ \t\n{](.|\n)*)?/"
"""In Llama 3's format a completion that begins with a brace is a call."""


def arguments_schema(tool: CallableTool) -> dict[str, Any]:
    """A tool's schema with llguidance's own settings."""
    # A blank at most between JSON tokens: nobody reads arguments, each of them costs a step.
    guidance: dict[str, Any] = {"whitespace_pattern": r"\x20"}
    if not tool.is_strict:
        guidance["lenient"] = True
    schema: dict[str, Any] = close_objects(json.loads(tool.schema))
    return schema | {"x-guidance": guidance}


def write_calls(calls: ToolCalls, *, has_content: bool, has_llama_tag: bool) -> str:
    """Rules of a completion with calls; `@arguments_N` are those of tool N.

    Args:
        has_content: a completion without calls has a form too, `@content`.
        has_llama_tag: the vocabulary has Llama 3's special token.
    """
    is_hermes = calls.tool_format == "hermes"
    key = "arguments" if is_hermes else "parameters"
    # JSON token by JSON token: in one piece, the head would win over an object that is content.
    heads = (["{", '"name"', ":", " ", json.dumps(tool.name), ",", " ", f'"{key}"', ":", " "]
             for tool in calls.tools)  # fmt: skip
    bodies = [
        f'{" ".join(map(json.dumps, head))} @arguments_{number} "}}"'
        for number, head in enumerate(heads)
    ]
    rules = [f"body: {' | '.join(bodies)}"]
    if is_hermes:
        tag = json.dumps(HERMES_TAG)
        rules += [f"call: {tag} rest", r'rest: "\n" body "\n</tool_call>"']
        separator = r'"\n"'
    else:
        rules.append("call: body")
        separator = '"; "'
    rules.append("calls: call" if calls.is_single else f"calls: call ({separator} call)*")
    if calls.is_required:
        start = "calls"
    elif has_content:
        start = "calls | @content"
    elif is_hermes:
        # Lazy: once the tag is there, the text before it is over.
        rules += [FREE_TEXT, f"opening[lazy]: TEXT {tag}"]
        start = "opening rest | TEXT" if calls.is_single else "(opening rest)* TEXT"
    else:
        rules.append(NO_CALL)
        start = f"{LLAMA_TAG}? calls | TEXT" if has_llama_tag else "calls | TEXT"
    return "\n".join([f"start: {start}", *rules])
