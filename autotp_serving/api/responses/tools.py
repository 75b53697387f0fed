"""Tools of /v1/responses as those of a chat, and calls of a chat as this route's. Rank 0 only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from autotp_serving.api.openai.tool_schemas import MAX_TOOLS
from autotp_serving.api.responses.schemas import (
    AllowedReferences,
    ResponsesRequest,
    ResponseTool,
    ToolReference,
)
from autotp_serving.request import RequestError

HOSTED_BY_DEFAULT = frozenset({"web_search"})
"""Tools that the provider runs, and that agents name without being asked to."""

CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""A custom tool takes a text: to the model it is a function of one argument."""


@dataclass(frozen=True)
class CallableName:
    """What the client calls a tool.

    Attributes:
        name: its own.
        namespace: the group that it is in.
        is_custom: it takes a text, not arguments.
    """

    name: str
    namespace: str | None = None
    is_custom: bool = False


def chat_name(name: str, namespace: str | None) -> str:
    """The one name by which the model knows a tool."""
    return f"{namespace}.{name}" if namespace else name


def read_arguments(arguments: str, *, is_custom: bool) -> str:
    """A call's arguments as the client wants them: of a custom tool, its text."""
    if not is_custom:
        return arguments
    try:
        return str(json.loads(arguments)["input"])
    except (ValueError, TypeError, KeyError, RecursionError):  # cut short, or not as it was told to
        return arguments


class ChatTools:
    """The tools of one request.

    Args:
        body: the request's.

    Attributes:
        tools: as a chat's body has them.
        names: what the client calls each, by the name that the model knows.
        ignored: fields that name tools which there are not.

    Raises:
        RequestError: naming a tool that cannot be had.
    """

    def __init__(self, body: ResponsesRequest) -> None:
        self.tools: list[dict[str, Any]] = []
        self.names: dict[str, CallableName] = {}
        self.ignored: list[str] = []
        for number, tool in enumerate(body.tools or ()):
            field = f"tools.{number}"
            if tool.type == "namespace":
                self._add_namespace(tool, field)
            elif tool.type in HOSTED_BY_DEFAULT:
                self.ignored.append(f"{field} ({tool.type})")
            else:
                self._add(tool, field, None)
        if len(self.tools) > MAX_TOOLS:
            raise RequestError("tools", f"must be at most {MAX_TOOLS}, namespaces counted through")
        self.choice = _read_choice(body.tool_choice)

    def _add_namespace(self, group: ResponseTool, field: str) -> None:
        if not group.name:
            raise RequestError(field, "a namespace needs a name")
        for number, one in enumerate(group.tools or ()):
            place = f"{field}.tools.{number}"
            try:
                tool = ResponseTool.model_validate(one)
            except ValidationError as error:
                first = error.errors()[0]
                path = ".".join(map(str, (place, *first["loc"][:1])))
                raise RequestError(path, first["msg"]) from error
            self._add(tool, place, group.name)

    def _add(self, tool: ResponseTool, field: str, namespace: str | None) -> None:
        if tool.type not in ("function", "custom"):
            raise RequestError(
                f"{field}.type", f"'{tool.type[:40]}' is run by no one here: send functions"
            )
        if not tool.name:
            raise RequestError(f"{field}.name", "is missing")
        is_custom = tool.type == "custom"
        if is_custom and (tool.format or {}).get("type", "text") != "text":
            raise RequestError(f"{field}.format", "a custom tool takes free text only")
        name = chat_name(tool.name, namespace)
        if name in self.names:
            raise RequestError(f"{field}.name", f"'{name[:40]}' is there twice")
        self.names[name] = CallableName(tool.name, namespace, is_custom)
        function: dict[str, Any] = {"name": name, "strict": bool(tool.strict)}
        if tool.description is not None:
            function["description"] = tool.description
        parameters = CUSTOM_PARAMETERS if is_custom else tool.parameters
        if parameters is not None:
            function["parameters"] = parameters
        self.tools.append({"type": "function", "function": function})


def _read_choice(choice: str | ToolReference | AllowedReferences | None) -> Any:
    """The same in a chat's words."""
    if isinstance(choice, ToolReference):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedReferences):
        tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice
