"""Anthropic's bodies as those of a chat completion. Rank 0 only."""

from __future__ import annotations

from typing import Any

from autotp_serving.api.anthropic.messages import ends_in_prefill, to_messages
from autotp_serving.api.anthropic.schemas import (
    AnthropicToolChoice,
    CountTokensRequest,
    MessagesRequest,
)
from autotp_serving.api.ignored_fields import list_ignored
from autotp_serving.api.openai.reasoning_options import ReasoningOptions
from autotp_serving.request import RequestError

FIELDS = {
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "chat_template_kwargs": "thinking",
    "thinking_budget": "thinking.budget_tokens",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
"""Of a chat completion, and what here each is made of, where the names differ."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: CountTokensRequest, reasoning: ReasoningOptions) -> dict[str, Any]:
    """The chat completion that is asked for.

    Raises:
        RequestError: naming what cannot be had.
    """
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": to_messages(body),
        "tools": _read_tools(body) or None,
        "chat_template_kwargs": reasoning.for_template(wants_thinking(body), _effort(body)),
    }
    if body.thinking is not None and wants_thinking(body):
        fields["thinking_budget"] = body.thinking.budget_tokens
    if ends_in_prefill(body):
        fields["continue_final_message"] = True
    if body.tool_choice is not None:
        fields["tool_choice"] = _read_choice(body.tool_choice)
        if body.tool_choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
        }
    return {name: value for name, value in fields.items() if value is not None}


def wants_thinking(body: CountTokensRequest) -> bool:
    """True where the model is to think first; without the field it is not, as in Anthropic's."""
    return body.thinking is not None and body.thinking.type != "disabled"


def list_all_ignored(body: CountTokensRequest, reasoning: ReasoningOptions) -> list[str]:
    """Fields that change nothing, and those that the chat template cannot be told of."""
    ignored = list_ignored(body)
    for name in ("thinking", "output_config"):
        part = getattr(body, name)
        ignored += [f"{name}.{one}" for one in list_ignored(part)] if part is not None else []
    told = body.thinking is None or body.thinking.budget_tokens is not None
    if not told and reasoning.switch is None:
        ignored.append("thinking")
    if _effort(body) is not None and not reasoning.has_effort:
        ignored.append("output_config.effort")
    return ignored


def _effort(body: CountTokensRequest) -> str | None:
    return None if body.output_config is None else body.output_config.effort


def _read_tools(body: CountTokensRequest) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(body.tools or ()):
        if tool.type not in (None, "custom"):
            raise RequestError(
                f"tools.{number}.type",
                f"'{tool.type[:40]}' is run by no one here, nor known to the model: send tools "
                "with an input_schema",
            )
        function: dict[str, Any] = {"name": tool.name, "strict": bool(tool.strict)}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.input_schema is not None:
            function["parameters"] = tool.input_schema
        tools.append({"type": "function", "function": function})
    return tools


def _read_choice(choice: AnthropicToolChoice) -> Any:
    if choice.type != "tool":
        return CHOICES[choice.type]
    if not choice.name:
        raise RequestError("tool_choice.name", "is missing")
    return {"type": "function", "function": {"name": choice.name}}
