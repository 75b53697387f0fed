"""What a chat template expects of earlier turns, read off its syntax. Rank 0 and its helpers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
from jinja2 import nodes

GENERATION_BLOCK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Marks of transformers' own, which plain Jinja does not know."""

SHORT_ID_LEN = 9
SHORT_ID_CHECK = re.compile(rf"(?:length|count)\s*(?:!=|==|<|>=)\s*{SHORT_ID_LEN}\b")

MAPPING_FILTERS = frozenset({"tojson", "items", "dictsort", "list", "length"})
MAPPING_METHODS = frozenset({"items", "keys", "values", "get"})
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class TemplateHabits:
    """What a chat template expects of earlier turns.

    Attributes:
        writes_calls: it writes out the tool calls of a message.
        arguments_are_text: it puts a call's arguments between other texts, as JSON.
        takes_text: it knows what to do with arguments that are a text.
        tests_none: it asks whether a message's content is none.
        wants_short_ids: ids of calls must have nine letters and digits.
        reasoning_key: its word for what was thought before an answer.
        reads_tools_of_message: it reads the tools off the system message and nowhere else.
    """

    writes_calls: bool = True
    arguments_are_text: bool = False
    takes_text: bool = False
    tests_none: bool = False
    wants_short_ids: bool = False
    reasoning_key: str = REASONING_KEYS[0]
    reads_tools_of_message: bool = False


def find_habits(source: str) -> TemplateHabits:
    """Read off a template's syntax what it expects; of one without syntax, the usual."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            GENERATION_BLOCK.sub("", source)
        )
    except (jinja2.TemplateSyntaxError, RecursionError):
        return TemplateHabits()
    # Whatever is set from arguments is arguments too.
    names: set[str] = set()
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _key(assignment.node) == "arguments":
            names.add(assignment.target.name)

    def are_arguments(node: nodes.Node | None) -> bool:
        return _key(node) == "arguments" or (isinstance(node, nodes.Name) and node.name in names)

    is_mapping = any(map(are_arguments, _used_as_mapping(tree)))
    tests = [node for node in tree.find_all(nodes.Test) if are_arguments(node.node)]
    takes_text = any(test.name == "string" for test in tests)
    is_text = any(map(are_arguments, _used_as_text(tree)))
    keys = {_key(node) for node in tree.find_all((nodes.Getattr, nodes.Getitem))}
    variables = {name.name for name in tree.find_all(nodes.Name)}
    return TemplateHabits(
        writes_calls="tool_calls" in source,
        arguments_are_text=is_text and not is_mapping and not tests,
        takes_text=takes_text,
        tests_none=any(
            test.name == "none" and _key(test.node) == "content"
            for test in tree.find_all(nodes.Test)
        ),
        wants_short_ids=SHORT_ID_CHECK.search(source) is not None,
        reasoning_key=next((key for key in REASONING_KEYS if key in keys), REASONING_KEYS[0]),
        reads_tools_of_message="tools" in keys and "tools" not in variables,
    )


def _key(node: nodes.Node | None) -> str | None:
    """The last part of a path such as `call.function.arguments` or `call['arguments']`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


def _used_as_mapping(tree: nodes.Template) -> Iterator[nodes.Node | None]:
    for use in tree.find_all((nodes.Filter, nodes.For, nodes.Call, nodes.Getitem)):
        if isinstance(use, nodes.Filter) and use.name in MAPPING_FILTERS:
            yield use.node
        elif isinstance(use, nodes.For):
            yield use.iter
        elif isinstance(use, nodes.Call) and isinstance(use.node, nodes.Getattr):
            if use.node.attr in MAPPING_METHODS:
                yield use.node.node
        elif isinstance(use, nodes.Getitem):
            yield use.node


def _used_as_text(tree: nodes.Template) -> Iterator[nodes.Node]:
    for use in tree.find_all((nodes.Output, nodes.Add, nodes.Concat)):
        if isinstance(use, nodes.Add):
            yield from (use.left, use.right)
        elif isinstance(use, nodes.Output | nodes.Concat):
            yield from use.nodes
