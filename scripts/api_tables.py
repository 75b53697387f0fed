"""Write the tables of fields in docs/api.md from the schemas: `python -m scripts.api_tables`.

A test compares them, so that the document cannot go stale.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from autotp_serving.api.adapter_routes import LoadAdapterRequest, UnloadAdapterRequest
from autotp_serving.api.anthropic.schemas import (
    CountTokensRequest,
    MessagesRequest,
    OutputConfig,
    OutputFormat,
    Thinking,
)
from autotp_serving.api.native_schemas import GenerateRequest
from autotp_serving.api.openai.chat_schemas import ChatMessage, ChatRequest, TextPart
from autotp_serving.api.openai.peer_fields import PeerFields
from autotp_serving.api.openai.schemas import (
    CompletionRequest,
    OpenAIRequest,
    SampledRequest,
    StreamOptions,
)
from autotp_serving.api.openai.tool_schemas import (
    AllowedTools,
    AllowedToolsChoice,
    CalledFunction,
    FunctionDefinition,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
)
from autotp_serving.api.pooling.schemas import (
    Document,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from autotp_serving.api.responses.schemas import (
    ReasoningConfig,
    ResponsesRequest,
    ResponseStreamOptions,
    TextFormat,
    TextOptions,
)
from autotp_serving.api.sampling_fields import SamplingFields
from autotp_serving.api.structured_output import (
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputFields,
    StructuredOutputs,
)
from autotp_serving.api.tokenize_routes import DetokenizeRequest, TokenizeRequest

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
MODELS: tuple[type[BaseModel], ...] = (
    GenerateRequest, SampledRequest, OpenAIRequest, PeerFields, CompletionRequest, ChatRequest,
    ChatMessage, TextPart, SamplingFields, StructuredOutputFields, ResponseFormat, JsonSchemaFormat,
    StructuredOutputs, StreamOptions, ResponsesRequest, TextOptions, TextFormat, ReasoningConfig,
    ResponseStreamOptions, CountTokensRequest, MessagesRequest, Thinking, OutputConfig,
    OutputFormat, Tool, FunctionDefinition, NamedTool, NamedFunction,
    AllowedToolsChoice, AllowedTools, ToolCall, CalledFunction,
    TokenizeRequest, DetokenizeRequest, PoolingRequest, EmbeddingRequest, RerankRequest, Document,
    ScoreRequest, LoadAdapterRequest, UnloadAdapterRequest,
)  # fmt: skip
MARK = re.compile(r"(<!-- fields of (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The document with every table between its marks written anew."""
    models = {model.__name__: model for model in MODELS}
    return MARK.sub(lambda match: match[1] + table(models[match[2]]) + match[4], text)


def table(model: type[BaseModel]) -> str:
    """Fields of a body: those of its parent are in the parent's own table."""
    schema = model.model_json_schema(mode="validation")
    inherited = {
        name for parent in model.__mro__[1:] if parent in MODELS for name in parent.model_fields
    }
    rows = [
        row(name, field, name in schema.get("required", ()))
        for name, field in schema["properties"].items()
        if name not in inherited
    ]
    # What is honoured first; each part in the schema's order.
    rows.sort(key=lambda cells: cells[1] != "yes")
    lines = ["| field | honoured | meaning | default |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def row(name: str, field: dict[str, Any], is_required: bool) -> tuple[str, str, str, str]:
    """Cells of one field."""
    if field.get("x-ignored"):
        return f"`{name}`", "ignored, told", field["description"], "-"
    options = field.get("enum", ())
    if None in options and "type" not in field:  # `only(...)`
        shown = ", ".join(f"`{json.dumps(value)}`" for value in options)
        return f"`{name}`", f"only {shown}", field.get("description", "not supported yet"), "-"
    meaning = field.get("description")
    if "x-ignored" in field:
        return f"`{name}`", "no, and told in `X-Ignored-Fields`", str(meaning), "-"
    assert meaning, f"{name} needs a description"
    allowed = [field["const"]] if "const" in field else options
    if allowed:
        meaning += f": {', '.join(f'`{json.dumps(value)}`' for value in allowed)}"
    if is_required:
        return f"`{name}`", "yes", meaning, "required"
    # Null means the default, which the description tells where it is more than nothing.
    meaning, _, told = re.sub("; default:? ", "\n", meaning).partition("\n")
    default = field.get("default")
    if default is not None:
        told = json.dumps(default)
    elif not told:
        kinds = {option.get("type") for option in field.get("anyOf", ())}
        told = "false" if "boolean" in kinds else "none"
    return f"`{name}`", "yes", meaning, told


def main() -> int:
    """Rewrite the document."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
