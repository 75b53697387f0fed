"""Body of /v1/responses: fields are honoured, told as ignored, or refused by name. Rank 0 only.

Earlier turns that come back in `input` are read generously: unknown fields of items mean nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from autotp_serving.api.history import HistoryModel
from autotp_serving.api.ignored_fields import Ignored
from autotp_serving.api.openai.chat_schemas import Variables
from autotp_serving.api.openai.schemas import LABEL, SampledRequest
from autotp_serving.api.openai.tool_schemas import MAX_TOOLS
from autotp_serving.api.schemas import (
    PRIORITY,
    Priority,
    StrictModel,
    Text,
    at_most,
    bounded,
    only,
)
from autotp_serving.api.structured_output import JsonSchema
from autotp_serving.request import MAX_LOGPROBS, RequestError

MAX_ITEMS = 2**14
MAX_INCLUDES = 64
MAX_LABELS = 1024
BOOKKEEPING = "a provider's bookkeeping"
LOGPROBS = "message.output_text.logprobs"


Metadata = Annotated[dict[Text, Text], at_most(MAX_LABELS)]


class InputPart(HistoryModel):
    """A piece of an item: `input_text`, `output_text`, `reasoning_text`, `refusal` and others."""

    type: Text = "input_text"
    text: Text | None = None
    refusal: Text | None = None


Parts = Annotated[list[InputPart], Field(fail_fast=True), at_most(MAX_ITEMS)]


class InputItem(HistoryModel):
    """One item of the conversation: a message, a call, a call's output, or reasoning."""

    type: Text | None = None
    id: Text | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | Parts | None = None
    summary: Parts | None = None
    call_id: Text | None = None
    name: Text | None = None
    namespace: Text | None = None
    arguments: Text | None = None
    input: Text | None = None
    output: Text | Parts | None = None


class ResponseTool(HistoryModel):
    """Something that the model may call: `function`, `custom`, or a `namespace` of these."""

    type: Text
    name: Text | None = None
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None


class ToolReference(HistoryModel):
    """A tool by its name."""

    type: Literal["function", "custom"]
    name: Text


class AllowedReferences(HistoryModel):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ToolReference] = Field(min_length=1, max_length=MAX_TOOLS)


class TextFormat(StrictModel):
    """Structured output, as this route words it."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="what it has to be")
    name: Text | None = Field(None, description="for the caller's own books")
    description: Text | None = Field(None, description="for the caller's own books")
    schema_: JsonSchema | None = Field(
        None, alias="schema", description="the schema, with type json_schema; default: none"
    )
    strict: bool | None = Field(
        None, description="the text keeps to the schema either way; default: true"
    )

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise RequestError("schema", "goes with type json_schema, and only with it")
        return self


class TextOptions(StrictModel):
    """About the text of the response."""

    format: TextFormat | None = Field(None, description="structured output; default: free text")
    verbosity: Ignored = Field(None, description="how long the text should be")


class ReasoningConfig(StrictModel):
    """About the reasoning before it."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="for the chat template, if it reads it; none: no reasoning"
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="the reasoning comes as `summary`, whole; default: as `content`"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="older name of summary"
    )


class ResponseStreamOptions(StrictModel):
    """About the stream."""

    include_obfuscation: Annotated[Any, only(False)] = None


class ResponsesRequest(SampledRequest):
    """Body of /v1/responses."""

    model: Text | None = Field(None, description="a name from /v1/models; default: the first")
    input: Text | Annotated[list[InputItem], Field(fail_fast=True), at_most(MAX_ITEMS)] = Field(
        description="what the user says, or the items of the conversation so far"
    )
    instructions: Text | None = Field(None, description="a system message before the conversation")
    stream: bool | None = Field(None, description="answer in server-sent events")
    stream_options: ResponseStreamOptions | None = Field(None, description="only with stream")
    max_output_tokens: int | None = Field(
        None, ge=1, description="most tokens to generate, reasoning included; default: what fits"
    )
    text: TextOptions | None = Field(None, description="structured output")
    reasoning: ReasoningConfig | None = Field(None, description="how much, and how it is shown")
    chat_template_kwargs: Variables | None = Field(
        None, description="variables of the model's chat template; over what `reasoning` says"
    )
    tools: (
        Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True), bounded()] | None
    ) = Field(None, description="what may be called")
    tool_choice: Literal["none", "auto", "required"] | ToolReference | AllowedReferences | None = (
        Field(None, description="whether tools are called, as in chat completions; default: auto")
    )
    parallel_tool_calls: bool | None = Field(
        None, description="more than one call in a response; default true"
    )
    include: Annotated[list[Text], Field(max_length=MAX_INCLUDES)] | None = Field(
        None, description=f"what else to tell: `{LOGPROBS}`; there is nothing else here"
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="give the text's logprobs, with so many most likely tokens beside each",
    )
    priority: Priority | None = Field(None, description=PRIORITY)
    truncation: Annotated[Any, only("disabled")] = None
    metadata: Metadata | None = Field(None, description=LABEL)
    user: Text | None = Field(None, description=LABEL)
    safety_identifier: Text | None = Field(None, description=LABEL)
    prompt_cache_key: Text | None = Field(None, description=LABEL)

    store: bool | None = Field(
        None,
        description="keep the response, with --responses-store; false: its items cannot be "
        "referred to either",
    )
    previous_response_id: Text | None = Field(
        None, description="go on from that response, with --responses-store"
    )
    service_tier: Ignored = Field(None, description=BOOKKEEPING)
    client_metadata: Ignored = Field(None, description=BOOKKEEPING)
    prompt_cache_options: Ignored = Field(None, description=BOOKKEEPING)
    prompt_cache_retention: Ignored = Field(None, description=BOOKKEEPING)
    max_tool_calls: Ignored = Field(None, description="about tools that the server runs: none")

    conversation: Annotated[Any, only()] = None
    background: Annotated[Any, only(False)] = None
    prompt: Annotated[Any, only()] = None
    context_management: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _check_fields_together(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is only allowed with stream: true")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """True where the text's tokens are to be told with their logprobs."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def shows_summary(self) -> bool:
        """True where reasoning comes as its summary."""
        options = self.reasoning
        return options is not None and (options.summary or options.generate_summary) is not None
