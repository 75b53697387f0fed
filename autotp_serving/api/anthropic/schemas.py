"""Bodies of Anthropic's routes: fields are honoured, told as ignored, or refused by name. Rank 0.

Messages are read generously, as they hold what came of earlier turns: unknown fields of them and
of their blocks mean nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from autotp_serving.api.history import HistoryModel
from autotp_serving.api.ignored_fields import Ignored
from autotp_serving.api.openai.chat_schemas import MAX_MESSAGES
from autotp_serving.api.openai.schemas import LABEL
from autotp_serving.api.openai.tool_schemas import MAX_TOOLS
from autotp_serving.api.schemas import (
    MAX_STOP_STRINGS,
    StopText,
    StrictModel,
    Text,
    at_most,
    bounded,
    only,
)
from autotp_serving.api.structured_output import JsonSchema

BOOKKEEPING = "the provider's own"
MAX_BLOCKS = 2**14


class ResultBlock(HistoryModel):
    """A piece of a tool's result."""

    type: Text
    text: Text | None = None


class Block(ResultBlock):
    """A piece of a message: `text`, `thinking`, `tool_use`, `tool_result` and others."""

    thinking: Text | None = None
    id: Text | None = None
    name: Text | None = None
    input: Annotated[dict[str, Any], bounded()] | None = None
    tool_use_id: Text | None = None
    content: (
        Text | Annotated[list[ResultBlock], Field(fail_fast=True), at_most(MAX_BLOCKS)] | None
    ) = None
    is_error: bool | None = None


Blocks = Annotated[list[Block], Field(fail_fast=True), at_most(MAX_BLOCKS)]


class AnthropicMessage(HistoryModel):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class AnthropicTool(HistoryModel):
    """A tool that the client runs, `type` "custom", or one that a server would."""

    type: Text | None = None
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class AnthropicToolChoice(HistoryModel):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(StrictModel):
    """Whether the model thinks first, where its chat template can be told."""

    type: Literal["enabled", "adaptive", "disabled"] = Field(
        description="adaptive leaves it to the model, which is asked to"
    )
    budget_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of thinking, with type enabled; default: as many as fit",
    )
    display: Ignored = Field(None, description="how much of it is shown: all")


class OutputFormat(StrictModel):
    """Structured output, as these routes word it."""

    type: Literal["json_schema"] = Field(description="the only kind")
    schema_: JsonSchema = Field(alias="schema", description="the schema")


class OutputConfig(StrictModel):
    """About what is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="for the chat template, if it reads it as reasoning_effort"
    )
    format: OutputFormat | None = Field(None, description="structured output; default: free text")
    task_budget: Ignored = Field(None, description=BOOKKEEPING)


class MessageMetadata(HistoryModel):
    """For the caller's own books."""

    user_id: Text | None = None


class CountTokensRequest(StrictModel):
    """Body of /v1/messages/count_tokens."""

    model: Text | None = Field(None, description="a name from /v1/models; default: the first")
    messages: Annotated[
        list[AnthropicMessage], Field(min_length=1, fail_fast=True), at_most(MAX_MESSAGES)
    ] = Field(description="the conversation so far; text of the assistant at its end is continued")
    system: Text | Blocks | None = Field(None, description="a system message before it")
    tools: (
        Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True), bounded()]
        | None
    ) = Field(None, description="what may be called")
    tool_choice: AnthropicToolChoice | None = Field(
        None, description="whether tools are called: auto, any, tool with its name, or none"
    )
    thinking: Thinking | None = Field(
        None, description="whether the model thinks first; default: not, if it can be told"
    )
    output_config: OutputConfig | None = Field(None, description="structured output, effort")

    cache_control: Ignored = Field(None, description="prompts are cached anyway")
    context_management: Ignored = Field(None, description=BOOKKEEPING)
    speed: Ignored = Field(None, description=BOOKKEEPING)

    mcp_servers: Annotated[Any, only([])] = None
    container: Annotated[Any, only()] = None
    prefill: Annotated[Any, only()] = None


class MessagesRequest(CountTokensRequest):
    """Body of /v1/messages."""

    max_tokens: int = Field(ge=1, description="most tokens to generate; cut to what fits")
    stream: bool | None = Field(None, description="answer in server-sent events")
    temperature: float | None = Field(
        None, ge=0.0, le=100.0, description="what logits are divided by; 0 is greedy; default 1"
    )
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="keep the most likely tokens of this share; default 1"
    )
    top_k: int | None = Field(
        None, ge=-1, description="keep so many most likely tokens; 0 or -1 keeps all; default 0"
    )
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = Field(
        None, description="text at which to end; not returned"
    )
    metadata: Annotated[MessageMetadata, at_most(128)] | None = Field(None, description=LABEL)

    service_tier: Ignored = Field(None, description=BOOKKEEPING)
    inference_geo: Ignored = Field(None, description=BOOKKEEPING)
    diagnostics: Ignored = Field(None, description=BOOKKEEPING)
