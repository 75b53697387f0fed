"""The fields that ask for structured output, in OpenAI's words and in its peers'. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from autotp_serving.api.schemas import NonEmptyText, StrictModel, Text, at_most, bounded
from autotp_serving.request import RequestError
from autotp_serving.structured_output import StructuredOutput

MAX_CHOICE_TEXTS = 1024
MAX_KEYWORDS = 1024

Choices = Annotated[list[NonEmptyText], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)]
JsonSchema = Annotated[dict[Text, Any], at_most(MAX_KEYWORDS), bounded()] | bool


class JsonSchemaFormat(StrictModel):
    """A named JSON schema. It is always kept to, `strict` or not."""

    name: Text | None = Field(None, description="for the caller's own books")
    description: Text | None = Field(None, description="for the caller's own books")
    schema_: JsonSchema | None = Field(
        None, alias="schema", description="the schema; default: any object"
    )
    strict: bool | None = Field(
        None, description="the completion keeps to the schema either way; default: true"
    )


class ResponseFormat(StrictModel):
    """The structured output, in OpenAI's spelling, llama.cpp's (`schema`) or TGI's (`value`)."""

    type: Literal["text", "json_object", "json_schema", "json", "regex"] = Field(
        description="what it has to be"
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="goes with its type")
    schema_: JsonSchema | None = Field(
        None, alias="schema", description="the schema; default: any object"
    )
    value: JsonSchema | NonEmptyText | None = Field(
        None, description="the schema or, of type regex, the expression"
    )

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        given = {"json_schema": self.json_schema, "schema": self.schema_, "value": self.value}
        names = [name for name, one in given.items() if one is not None]
        if len(names) > 1:
            raise RequestError(names[1], f"cannot be combined with {names[0]}")
        needs_schema = self.type == "json_schema"
        if (needs_schema and not names) or (not needs_schema and self.json_schema is not None):
            raise RequestError("json_schema", "goes with type json_schema, and only with it")
        if (self.type == "regex") != isinstance(self.value, str):
            raise RequestError("value", "is a text with type regex, and only with it")
        if names and self.type == "text":
            raise RequestError(names[0], "goes with another type than text")
        return self

    def structured_output(self) -> StructuredOutput | None:
        """What is asked for; None for text."""
        if self.type == "text":
            return None
        if isinstance(self.value, str):
            return StructuredOutput("regex", self.value)
        if self.json_schema is not None:
            return _json_structured_output(self.json_schema.schema_)
        schema = self.schema_ if self.value is None else self.value
        if isinstance(schema, dict) and self.type == "json_schema":
            schema = schema.get("schema", schema)  # TGI's names it
            if not isinstance(schema, dict | bool):
                raise RequestError("response_format.value", "holds no schema")
        return _json_structured_output(schema)


class StructuredOutputs(StrictModel):
    """vLLM's newer way to say the same; exactly one of them."""

    json_: JsonSchema | Text | None = Field(
        None, alias="json", description="JSON schema of the completion; default: none"
    )
    regex: NonEmptyText | None = Field(
        None, description="regular expression for the whole completion"
    )
    choice: Choices | None = Field(None, description="texts of which it is one")
    grammar: NonEmptyText | None = Field(None, description="its grammar, in Lark or GBNF")
    json_object: bool | None = Field(None, description="any JSON object")


class StructuredOutputFields(StrictModel):
    """Fields of a request of which at most one may be set."""

    response_format: ResponseFormat | None = Field(None, description="structured output")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="structured output, in vLLM's words"
    )
    guided_json: JsonSchema | Text | None = Field(
        None, description="JSON schema of the completion; default: none"
    )
    guided_regex: NonEmptyText | None = Field(
        None, description="regular expression for the whole completion"
    )
    guided_choice: Choices | None = Field(None, description="texts of which the completion is one")
    guided_grammar: NonEmptyText | None = Field(
        None, description="grammar of the completion, in Lark or GBNF"
    )
    json_schema: JsonSchema | Text | None = Field(
        None, description="`guided_json`, as llama.cpp and SGLang call it; default: none"
    )
    regex: NonEmptyText | None = Field(None, description="`guided_regex`, as SGLang calls it")
    ebnf: NonEmptyText | None = Field(None, description="`guided_grammar`, as SGLang calls it")
    grammar: Text | None = Field(None, description="the same, as llama.cpp calls it; empty: none")

    @model_validator(mode="after")
    def _check_one_structured_output(self) -> StructuredOutputFields:
        names = [name for name, _ in self._structured_outputs()]
        if len(names) > 1:
            raise RequestError(names[1], f"cannot be combined with {names[0]}")
        return self

    def structured_output(self) -> tuple[str, StructuredOutput] | None:
        """What is asked for, and the field that asks; None if the completion is free."""
        return next(self._structured_outputs(), None)

    def _structured_outputs(self) -> Iterator[tuple[str, StructuredOutput]]:
        wanted = None
        if self.response_format is not None:
            wanted = self.response_format.structured_output()
        if wanted is not None:
            yield "response_format", wanted
        if self.guided_json is not None:
            yield "guided_json", _json_structured_output(self.guided_json)
        yield from _other_structured_outputs(
            "guided_", self.guided_regex, self.guided_choice, self.guided_grammar
        )
        if self.json_schema is not None:
            yield "json_schema", _json_structured_output(self.json_schema)
        yield from _other_structured_outputs("", self.regex, None, self.grammar or None)
        if self.ebnf is not None:
            yield "ebnf", StructuredOutput("grammar", self.ebnf)
        one = self.structured_outputs
        if one is not None:
            if one.json_ is not None:
                yield "structured_outputs.json", _json_structured_output(one.json_)
            if one.json_object:
                yield "structured_outputs.json_object", _json_structured_output(None)
            yield from _other_structured_outputs(
                "structured_outputs.", one.regex, one.choice, one.grammar
            )


def _json_structured_output(schema: JsonSchema | str | None) -> StructuredOutput:
    if schema is None:
        return StructuredOutput("json_object")
    # The order of properties is the order in which they are written.
    return StructuredOutput(
        "json_schema", schema if isinstance(schema, str) else json.dumps(schema)
    )


def _other_structured_outputs(
    prefix: str, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[tuple[str, StructuredOutput]]:
    if regex is not None:
        yield f"{prefix}regex", StructuredOutput("regex", regex)
    if choice is not None:
        yield f"{prefix}choice", StructuredOutput("choice", json.dumps(choice))
    if grammar is not None:
        yield f"{prefix}grammar", StructuredOutput("grammar", grammar)
