"""How families of models write tool calls, as data. Rank 0 and its helper processes.

One row for each format: what a chat template that teaches it holds, and a call as it is written
there. Parsers (`api/openai/tool_calls.py`) and grammars (`engine/tool_grammar.py`) read the rows;
a format with a way of its own to write arguments needs a reader and a rule beside its row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from autotp_serving.structured_output import ToolFormat

ArgumentsKind = Literal["object", "json", "pairs", "gemma"]

TAG = re.compile(r"<[^\s<>{}]+>|\[/?[A-Z_]+\]")
"""What a tokenizer may have as one token, such as `<tool_call>` or `[ARGS]`."""

HARMONY_TAGS = frozenset(
    {"<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"}
)


@dataclass(frozen=True)
class ToolSyntax:
    """How calls are written.

    Attributes:
        marks: texts that a chat template holds if it teaches this format.
        or_marks: texts of which any one tells the same.
        absent: texts that it does not hold then.
        call: one call. `{name}` is the tool's, `{index}` its number, `{arguments}` what it is
            called with; a call that is one JSON object is `{object}`.
        kind: arguments are a JSON object, the call and they are one, pairs of keys and values, or
            in Gemma's own notation.
        open: text at which what a model says is over; "": a completion is calls or has none.
        begin: before the first call.
        separator: between calls.
        end: after the last one.
        fillers: between calls, and meaning nothing there; beside what follows from the others.
        other_opens: what models write in place of `open`.
        pair: of `kind` pairs, one of them, with `{key}` and `{value}`.
        key: of `kind` object, its name for the arguments.
        quote: of `kind` gemma, the mark around texts.
    """

    marks: tuple[str, ...]
    call: str
    kind: ArgumentsKind
    or_marks: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    open: str = ""
    begin: str = ""
    separator: str = ""
    end: str = ""
    fillers: tuple[str, ...] = ()
    other_opens: tuple[str, ...] = ()
    pair: str = ""
    key: str = "arguments"
    quote: str = ""

    @property
    def before_name(self) -> str:
        """Of a call, what comes before its name."""
        return self.call.partition("{name}")[0]

    @property
    def between(self) -> str:
        """Of a call, what comes between its name and its arguments."""
        return self.call.partition("{name}")[2].partition("{arguments}")[0]

    @property
    def after(self) -> str:
        """Of a call, what comes after its arguments."""
        return re.split(r"\{arguments\}|\{object\}", self.call)[1]


SECTION = "<｜tool▁calls▁begin｜>"  # noqa: RUF001
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>"  # noqa: RUF001
DEEPSEEK_SEP = "<｜tool▁sep｜>"  # noqa: RUF001
DEEPSEEK_END = "<｜tool▁calls▁end｜>"  # noqa: RUF001

TOOL_SYNTAXES: dict[ToolFormat, ToolSyntax] = {
    "hermes": ToolSyntax(
        ("<tool_call>",), "<tool_call>\n{object}\n</tool_call>", "object",
        absent=("<function=", "<arg_key>"), open="<tool_call>", separator="\n",
    ),
    "llama3": ToolSyntax(
        ("<|python_tag|>",), "{object}", "object", separator="; ", key="parameters",
        or_marks=('"parameters": dictionary of argument name',), absent=("<tool_call>",),
        fillers=("<|python_tag|>", ";", ","),
    ),
    "mistral": ToolSyntax(
        ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]{name}[ARGS]{arguments}", "json",
        open="[TOOL_CALLS]",
    ),
    "mistral_json": ToolSyntax(
        ("[TOOL_CALLS]",), "{object}", "object", absent=("[ARGS]",),
        open="[TOOL_CALLS]", begin="[TOOL_CALLS] [", separator=", ", end="]",
    ),
    "qwen3_coder": ToolSyntax(
        ("<function=", "<tool_call>"),
        "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>", "pairs",
        open="<tool_call>", separator="\n", pair="<parameter={key}>\n{value}\n</parameter>\n",
    ),
    "glm45": ToolSyntax(
        ("<arg_key>", "<tool_call>"), "<tool_call>{name}\n{arguments}</tool_call>", "pairs",
        open="<tool_call>", separator="\n",
        pair="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
    "minimax_m2": ToolSyntax(
        ("<minimax:tool_call>",), '<invoke name="{name}">\n{arguments}</invoke>\n', "pairs",
        open="<minimax:tool_call>", begin="<minimax:tool_call>\n", end="</minimax:tool_call>",
        pair='<parameter name="{key}">{value}</parameter>\n',
    ),
    "deepseek_v3": ToolSyntax(
        (SECTION, "```json"),
        DEEPSEEK_CALL.format(f"function{DEEPSEEK_SEP}{{name}}\n```json\n{{arguments}}\n```"),
        "json", open=SECTION, begin=SECTION, separator="\n", end=DEEPSEEK_END,
    ),
    "deepseek_v31": ToolSyntax(
        (SECTION,), DEEPSEEK_CALL.format(f"{{name}}{DEEPSEEK_SEP}{{arguments}}"), "json",
        absent=("```json",), open=SECTION, begin=SECTION, end=DEEPSEEK_END,
    ),
    "kimi_k2": ToolSyntax(
        ("<|tool_calls_section_begin|>",),
        "<|tool_call_begin|>functions.{name}:{index}"
        "<|tool_call_argument_begin|>{arguments}<|tool_call_end|>", "json",
        open="<|tool_calls_section_begin|>", begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
    ),
    "phi4": ToolSyntax(
        ("<|tool|>",), "{object}", "object", open="<|tool_call|>", begin="<|tool_call|>[",
        separator=", ", end="]<|/tool_call|>", other_opens=("functools",),
    ),
    "granite": ToolSyntax(
        ("<|tool_call|>",), "{object}", "object", absent=("<|tool|>", "<tool_call>"),
        open="<|tool_call|>", begin="<|tool_call|>[", separator=", ", end="]",
        other_opens=("<tool_call>",),
    ),
    "gemma4": ToolSyntax(
        ("<|tool_call>",), "<|tool_call>call:{name}{arguments}<tool_call|>", "gemma",
        open="<|tool_call>", quote='<|"|>', fillers=("<|tool_response>",),
    ),
    "functiongemma": ToolSyntax(
        ("<start_function_call>",),
        "<start_function_call>call:{name}{arguments}<end_function_call>", "gemma",
        open="<start_function_call>", quote="<escape>", fillers=("<start_function_response>",),
    ),
    "harmony": ToolSyntax(
        ("<|channel|>", "<|message|>"),
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
        "json", open="<|channel|>",
    ),
}  # fmt: skip


def find_formats(chat_template: str) -> list[ToolFormat]:
    """The formats that a chat template teaches: one at most, unless two rows are at fault."""
    return [
        name
        for name, syntax in TOOL_SYNTAXES.items()
        if (
            all(mark in chat_template for mark in syntax.marks)
            or any(mark in chat_template for mark in syntax.or_marks)
        )
        and not any(mark in chat_template for mark in syntax.absent)
    ]


def list_tags(chat_template: str) -> frozenset[str]:
    """Tags of all formats, to be kept in a text even where a tokenizer calls them special.

    Those of gpt-oss have names so common that they count only where the template has them.
    """
    tags = set(HARMONY_TAGS) if "<|channel|>" in chat_template else set()
    for name, syntax in TOOL_SYNTAXES.items():
        texts = (syntax.begin, syntax.call, syntax.end, syntax.open, syntax.pair, syntax.quote)
        if name != "harmony":
            tags.update(*map(TAG.findall, texts))
    return frozenset(tags)
