"""Tools in a chat's body: what may be called, and calls of earlier turns. Rank 0 only."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from autotp_serving.api.schemas import GenerousModel, StrictModel, Text, check_bounds
from autotp_serving.request import RequestError
from autotp_serving.structured_output import CallableTool

MAX_TOOLS = 128


def _parse_arguments(value: Any) -> dict[str, Any] | str:
    """A call's arguments: an object, or what was written where that is none, or not all of one."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if not isinstance(parsed, dict):
            return value
    elif isinstance(value, dict):
        parsed = value
    else:
        raise ValueError("must be a JSON object, as text")
    check_bounds(parsed)
    arguments: dict[str, Any] = parsed
    return arguments


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class FunctionDefinition(GenerousModel):
    """What a function is for and what it takes."""

    name: ToolName = Field(description="what the model calls it by")
    description: Text | None = Field(None, description="tells the model when to call it")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments")
    strict: bool | None = Field(
        None, description="hold the arguments of every call to their schema; default false"
    )

    def as_callable(self) -> CallableTool:
        """The function as a grammar needs it. Raises RequestError naming the tool."""
        # OpenAI's rule: a function without parameters takes none.
        schema = {"properties": {}, "additionalProperties": False}
        if self.parameters is not None:
            schema = self.parameters
        if schema.get("type", "object") != "object":
            raise RequestError("tools", f"the parameters of {self.name} must be of type object")
        schema = {"type": "object"} | schema
        return CallableTool(self.name, json.dumps(schema), bool(self.strict))


class Tool(GenerousModel):
    """A tool that the model may call."""

    type: Literal["function"] = Field("function", description="the only kind of tool")
    function: FunctionDefinition = Field(description="the function")


class NamedFunction(StrictModel):
    """One of the functions in `tools`."""

    name: ToolName = Field(description="its name")


class NamedTool(StrictModel):
    """The tool that has to be called."""

    type: Literal["function"] = Field(description="the only kind of tool")
    function: NamedFunction = Field(description="which one")


class AllowedTools(StrictModel):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"] = Field(
        description="whether one of them is called: if the model likes, or at least one"
    )
    tools: list[NamedTool] = Field(
        min_length=1, max_length=MAX_TOOLS, description="which of the tools"
    )


class AllowedToolsChoice(StrictModel):
    """Only some of the tools are offered in this completion."""

    type: Literal["allowed_tools"] = Field(description="that it is about several tools")
    allowed_tools: AllowedTools = Field(description="which, and how")


ToolsByName = Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
ToolChoice = Literal["none", "auto", "required"] | ToolsByName


class CalledFunction(GenerousModel):
    """The function that an earlier completion called."""

    name: Text = Field(description="its name")
    arguments: Annotated[Text | dict[str, Any] | None, BeforeValidator(_parse_arguments)] = Field(
        None,
        validate_default=True,
        description="a JSON object, as text; what was cut short goes to the template as text, or "
        "as {} where it wants an object; default: {}",
    )


class ToolCall(GenerousModel):
    """A call in an earlier completion, sent back as it came."""

    id: Text | None = Field(None, description="what the tool's message refers to; default: made up")
    type: Literal["function"] | None = Field(None, description="the only kind of tool")
    function: CalledFunction = Field(description="the function and its arguments")

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it, but for what only some of them want."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        call: dict[str, Any] = {"type": "function", "function": function}
        return {"id": self.id} | call if self.id else call
