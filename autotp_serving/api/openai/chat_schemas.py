"""Body of /v1/chat/completions: every field is honoured or refused by name. Rank 0 only."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from autotp_serving.api.ignored_fields import Ignored
from autotp_serving.api.openai.schemas import LABEL, OpenAIRequest
from autotp_serving.api.openai.tool_schemas import (
    MAX_TOOLS,
    AllowedToolsChoice,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from autotp_serving.api.schemas import (
    GenerousModel,
    Text,
    at_most,
    bounded,
    only,
)
from autotp_serving.engine.chat_history import Message, write_tools
from autotp_serving.request import MAX_LOGPROBS, RequestError
from autotp_serving.structured_output import (
    Reasoning,
    ReasoningFormat,
    StructuredOutput,
    ToolCalls,
    ToolFormat,
)

MAX_MESSAGES = 2**14
MAX_VARIABLES = 1024


class TextPart(GenerousModel):
    """A piece of a message's content; images, sounds and files are refused."""

    type: Literal["text", "input_text", "output_text", "refusal", "thinking"] = Field(
        description="what the part is: text, in one word or another, or reasoning"
    )
    text: Text | None = Field(None, description="the part itself")
    refusal: Text | None = Field(None, description="the same, of type refusal")
    thinking: Text | None = Field(None, description="the same, of type thinking")

    @model_validator(mode="after")
    def _check_text(self) -> TextPart:
        if self.said is None:
            raise RequestError("text", "is missing")
        return self

    @property
    def said(self) -> str | None:
        """The text, whatever its field is called."""
        return {"refusal": self.refusal, "thinking": self.thinking}.get(self.type) or self.text


def _check_parts(content: Any) -> Any:
    """Name the first part that is no text; texts without a type are parts too."""
    if not isinstance(content, list):
        return content
    known = get_args(TextPart.model_fields["type"].annotation)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise ValueError(f"holds a part of type '{kind[:40]}': the model reads text only")
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


Content = Annotated[
    Text | Annotated[list[TextPart], Field(fail_fast=True)] | None, BeforeValidator(_check_parts)
]


class ChatMessage(GenerousModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="who says it; developer is another word for system"
    )
    content: Content = Field(
        None, description="what is said, parts joined by lines; a user or system says something"
    )
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(
        None, description="what an earlier completion called"
    )
    tool_call_id: Text | None = Field(
        None, description="which call a tool's message answers; default: the next one"
    )
    name: Text | None = Field(None, description="for templates that tell speakers apart")
    reasoning_content: Text | None = Field(
        None, description="reasoning of an earlier completion, for templates that read it"
    )
    reasoning: Annotated[Any, bounded()] = Field(None, description="the same, if it is a text")
    refusal: Annotated[Any, bounded()] = Field(
        None, description="of a completion without content: its text"
    )

    # What stands in these fields would be left out of what the model reads.
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    images: Annotated[Any, only([])] = None
    prefix: Annotated[Any, only(False)] = Field(None, description="see continue_final_message")
    partial: Annotated[Any, only(False)] = Field(None, description="see continue_final_message")

    @model_validator(mode="after")
    def _check_parts(self) -> ChatMessage:
        if self.content is None and self.role not in ("assistant", "tool"):
            raise RequestError("content", "is missing")
        if self.tool_calls and self.role != "assistant":
            raise RequestError("tool_calls", "belongs to messages of the assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it, but for what only some of them want."""
        content = self.content
        reasoning = self.reasoning_content
        if not reasoning and isinstance(self.reasoning, str):
            reasoning = self.reasoning
        if isinstance(content, list):
            said = [str(part.said) for part in content if part.type == "thinking"]
            reasoning = reasoning or "\n".join(said)
            content = "\n".join(str(part.said) for part in content if part.type != "thinking")
        if content is None and not self.tool_calls:
            content = self.refusal if isinstance(self.refusal, str) else ""
        # "developer" is OpenAI's newer word for "system"; no template knows it.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name:
            message["name"] = self.name
        if reasoning and role == "assistant":
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id and role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), bounded()]
Variables = Annotated[dict[Text, Any], at_most(MAX_VARIABLES), bounded()]
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), at_most(MAX_MESSAGES)]


def check_template_fields(
    begins_answer: bool | None, continues: bool | None, variables: dict[str, Any] | None
) -> None:
    """Refuse what a chat template cannot do at once. Raises RequestError naming a field.

    Args:
        begins_answer: `add_generation_prompt`.
        continues: `continue_final_message`.
        variables: `chat_template_kwargs`.
    """
    if continues and begins_answer:
        raise RequestError(
            "continue_final_message",
            "goes on with a message: not with add_generation_prompt, which begins another one",
        )
    if "tools" in (variables or {}):
        raise RequestError("chat_template_kwargs", "send tools in their own field")


class ChatRequest(OpenAIRequest):
    """Body of /v1/chat/completions."""

    messages: Messages = Field(description="the conversation so far")
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens")
    logprobs: bool | None = Field(None, description="give the tokens' logprobs; default false")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="most likely tokens to list beside each; default 0"
    )
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt with the completion's head; default true"
    )
    continue_final_message: bool | None = Field(
        None, description="go on with the last message's text"
    )
    chat_template_kwargs: Variables | None = Field(
        None, description="variables of the model's chat template"
    )

    metadata: Ignored = Field(None, description=LABEL)
    safety_identifier: Ignored = Field(None, description=LABEL)
    prompt_cache_key: Ignored = Field(None, description=LABEL)
    prompt_cache_options: Ignored = Field(
        None, description="the beginning of every prompt is looked up as it is"
    )
    prompt_cache_retention: Ignored = Field(None, description="blocks are kept while there is room")
    prediction: Ignored = Field(None, description="would only save time")
    service_tier: Ignored = Field(None, description="there is one")
    store: Ignored = Field(None, description="nothing is stored")
    verbosity: Ignored = Field(None, description="models have not learned it: say it in a message")

    tools: Tools | None = Field(None, description="what may be called")
    tool_choice: ToolChoice | None = Field(
        None,
        description="whether tools are called: not at all, if the model likes, at least one, "
        "this one once, or some of these only; default: auto",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="more than one call in a completion; default true"
    )
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    echo: Annotated[Any, only(False)] = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None
    add_special_tokens: Annotated[Any, only(False)] = None
    chat_template: Annotated[Any, only()] = None
    documents: Annotated[Any, only([])] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None
    separate_reasoning: Annotated[Any, only(True)] = None
    stream_reasoning: Annotated[Any, only(True)] = None
    include_reasoning: Annotated[Any, only(True)] = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(None, description="how much to reason, as far as the chat template can be told")
    )
    thinking_budget: int | None = Field(
        None, ge=-1, description="most tokens of reasoning, which then ends; -1: as many as fit"
    )
    max_thinking_tokens: int | None = Field(None, ge=-1, description="the same")
    thinking_token_budget: int | None = Field(None, ge=-1, description="the same, vLLM's name")

    @model_validator(mode="after")
    def _check_max_tokens(self) -> ChatRequest:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError("max_tokens", "and max_completion_tokens differ: send one")
        check_template_fields(
            self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs
        )
        return self

    @model_validator(mode="after")
    def _check_budgets(self) -> ChatRequest:
        if len(self._budgets) > 1:
            raise RequestError("max_thinking_tokens", "and another thinking budget differ")
        return self

    @property
    def _budgets(self) -> set[int]:
        budgets = (self.thinking_budget, self.max_thinking_tokens, self.thinking_token_budget)
        return {budget for budget in budgets if budget is not None}

    @property
    def most_thinking_tokens(self) -> int | None:
        """Most tokens of reasoning; None for as many as the model likes."""
        (budget,) = self._budgets or {-1}
        return None if budget < 0 else budget

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ChatRequest:
        if self.tool_choice in (None, "none", "auto"):
            return self
        if not self.tools:
            raise RequestError("tool_choice", "asks for a call, and there are no tools")
        missing = self.chosen_tools - {tool.function.name for tool in self.tools}
        if missing:
            raise RequestError("tool_choice", f"'{min(missing)}' is not among the tools")
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", "is only allowed with logprobs: true")
        return self

    def logprob_params(self) -> dict[str, Any]:
        return {
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "prompt_logprobs": self.prompt_logprobs,
        }

    def max_new_tokens(self, num_tokens_left: int) -> int:
        """Most tokens to generate; `num_tokens_left` is what the model has left for them."""
        return self.max_completion_tokens or self.max_tokens or max(1, num_tokens_left)

    @property
    def names_one_tool(self) -> bool:
        """True when the completion has to be one call of a tool that `tool_choice` names."""
        return isinstance(self.tool_choice, NamedTool)

    @property
    def chosen_tools(self) -> set[str]:
        """Names of the tools that `tool_choice` leaves; empty where it names none."""
        choice = self.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            return {tool.function.name for tool in choice.allowed_tools.tools}
        return {choice.function.name} if isinstance(choice, NamedTool) else set()

    @property
    def callable_tools(self) -> list[Tool]:
        """Tools that the model may call in this completion."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        chosen = self.chosen_tools
        return [tool for tool in tools if not chosen or tool.function.name in chosen]

    @property
    def requires_call(self) -> bool:
        """True when the completion has to be calls and nothing else."""
        choice = self.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or self.names_one_tool

    @property
    def allows_one_call(self) -> bool:
        """True when the completion may call one tool at most."""
        return self.parallel_tool_calls is False or self.names_one_tool

    def whole_structured_output(
        self,
        tool_format: ToolFormat | None,
        reasoning: Reasoning | None,
        reasoning_format: ReasoningFormat | None,
    ) -> tuple[str, StructuredOutput] | None:
        """The structured output, calls and reasoning included, and the field that asks for it.

        Calls are held to a form where one has to come, where a tool is strict, and where the rest
        of the completion is structured, which they could not break otherwise.

        Args:
            tool_format: how the model writes calls; None if it has not learned to.
            reasoning: whether it may think before it answers.
            reasoning_format: how it marks that.

        Raises:
            RequestError: naming the tool whose parameters are no object's.
        """
        field_name, structured_output = self.structured_output() or (
            "tools",
            StructuredOutput("text"),
        )
        tools = self.callable_tools
        is_required = self.requires_call
        is_strict = any(tool.function.strict for tool in tools)
        calls = None
        if tools and tool_format and (is_required or is_strict or structured_output.kind != "text"):
            named = tuple(tool.function.as_callable() for tool in tools)
            calls = ToolCalls(tool_format, named, is_required, self.allows_one_call)
        if calls is None and structured_output.kind == "text":
            return None
        whole = replace(structured_output, calls=calls, reasoning=reasoning)
        return field_name, replace(whole, reasoning_format=reasoning_format or "think")

    def for_template(self, *, knows_tools: bool = True) -> tuple[list[Message], dict[str, Any]]:
        """The conversation and the variables for the chat template.

        Args:
            knows_tools: the template does. If not, the conversation tells of those from which a
                call has to come, and of no others.
        """
        # What a grammar sees to is none of the model's business, which call is its to make is.
        shown = self.tools or [] if self.names_one_tool else self.callable_tools
        tools = [
            tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in shown
        ]
        messages = [message.for_template() for message in self.messages]
        if not knows_tools:
            if self.requires_call:
                messages = write_tools(messages, tools)
            tools = []
        options = {
            **(self.chat_template_kwargs or {}),
            **({"tools": tools} if tools else {}),
            "add_generation_prompt": self.add_generation_prompt is not False
            and not self.continue_final_message,
            "continue_final_message": bool(self.continue_final_message),
        }
        return messages, options
