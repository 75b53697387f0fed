"""The fields that give an answer a form, in OpenAI's words and in vLLM's. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from autotp_serving.api.schemas import NonEmptyText, StrictModel, Text, at_most, bounded
from autotp_serving.request import RequestError
from autotp_serving.structure import Structure

MAX_CHOICE_TEXTS = 1024
MAX_KEYWORDS = 1024

Choices = Annotated[list[NonEmptyText], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)]
JsonSchema = Annotated[dict[Text, Any], at_most(MAX_KEYWORDS), bounded()] | bool


class JsonSchemaFormat(StrictModel):
    """A named JSON schema. It is always kept to, `strict` or not."""

    name: Text = Field(description="for the caller's own books")
    description: Text | None = Field(None, description="for the caller's own books")
    schema_: JsonSchema | None = Field(
        None, alias="schema", description="the schema; default: any object"
    )
    strict: bool | None = Field(
        None, description="the answer keeps to the schema either way; default: true"
    )


class ResponseFormat(StrictModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="what it has to be")
    json_schema: JsonSchemaFormat | None = Field(None, description="goes with its type")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError("json_schema", "goes with type json_schema, and only with it")
        return self


class StructuredOutputs(StrictModel):
    """vLLM's newer way to say the same; exactly one of them."""

    json_: JsonSchema | Text | None = Field(
        None, alias="json", description="JSON schema of the answer; default: none"
    )
    regex: NonEmptyText | None = Field(None, description="regular expression for the whole answer")
    choice: Choices | None = Field(None, description="texts of which it is one")
    grammar: NonEmptyText | None = Field(None, description="its grammar, in Lark or GBNF")
    json_object: bool | None = Field(None, description="any JSON object")


class StructureFields(StrictModel):
    """Fields of a request of which at most one may be set."""

    response_format: ResponseFormat | None = Field(None, description="form of the answer")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="form of the answer, in vLLM's words"
    )
    guided_json: JsonSchema | Text | None = Field(
        None, description="JSON schema of the answer; default: none"
    )
    guided_regex: NonEmptyText | None = Field(
        None, description="regular expression for the whole answer"
    )
    guided_choice: Choices | None = Field(None, description="texts of which the answer is one")
    guided_grammar: NonEmptyText | None = Field(
        None, description="grammar of the answer, in Lark or GBNF"
    )

    @model_validator(mode="after")
    def _check_one_structure(self) -> StructureFields:
        names = [name for name, _ in self._structures()]
        if len(names) > 1:
            raise RequestError(names[1], f"cannot be combined with {names[0]}")
        return self

    def structure(self) -> tuple[str, Structure] | None:
        """The form asked for, and the field that asks; None if the answer is free."""
        return next(self._structures(), None)

    def _structures(self) -> Iterator[tuple[str, Structure]]:
        wanted = self.response_format
        if wanted is not None and wanted.type != "text":
            schema = None if wanted.json_schema is None else wanted.json_schema.schema_
            yield "response_format", _json_structure(schema)
        if self.guided_json is not None:
            yield "guided_json", _json_structure(self.guided_json)
        yield from _other_structures(
            "guided_", self.guided_regex, self.guided_choice, self.guided_grammar
        )
        one = self.structured_outputs
        if one is not None:
            if one.json_ is not None:
                yield "structured_outputs.json", _json_structure(one.json_)
            if one.json_object:
                yield "structured_outputs.json_object", _json_structure(None)
            yield from _other_structures("structured_outputs.", one.regex, one.choice, one.grammar)


def _json_structure(schema: JsonSchema | str | None) -> Structure:
    if schema is None:
        return Structure("json_object")
    # The order of properties is the order in which they are written.
    return Structure("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def _other_structures(
    prefix: str, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[tuple[str, Structure]]:
    if regex is not None:
        yield f"{prefix}regex", Structure("regex", regex)
    if choice is not None:
        yield f"{prefix}choice", Structure("choice", json.dumps(choice))
    if grammar is not None:
        yield f"{prefix}grammar", Structure("grammar", grammar)
