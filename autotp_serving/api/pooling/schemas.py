"""Bodies of the routes of embeddings and scores: each field honoured or refused. Rank 0 only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from autotp_serving.api.ignored_fields import Ignored
from autotp_serving.api.openai.schemas import LABEL, Prompts
from autotp_serving.api.schemas import (
    PRIORITY,
    GenerousModel,
    NonEmptyText,
    Priority,
    StrictModel,
    Text,
    at_most,
    only,
)
from autotp_serving.request import RequestError

MAX_INPUTS = 2048
"""Of one call, as OpenAI has it."""

MODEL = "a name from /v1/models; default: the first"
ACTIVATION = (
    "give probabilities (true) or the logits themselves; default: as the model's files have it"
)
INSTRUCTION = (
    "what the query is asked for; Qwen3-Reranker alone takes it; default: its makers' own, about "
    "web search"
)


class PoolingRequest(StrictModel):
    """What all of these routes take."""

    model: Text | None = Field(None, description=MODEL)
    user: Ignored = Field(None, description=LABEL)
    truncate_prompt_tokens: Annotated[Any, only()] = None
    priority: Priority | None = Field(None, description=PRIORITY)


class EmbeddingRequest(PoolingRequest):
    """Body of /v1/embeddings."""

    input: Prompts = Field(description=f"what to embed, {MAX_INPUTS} inputs at most")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="numbers, or the bytes of float32 in base64; default float"
    )
    dimensions: int | None = Field(
        None, ge=1, description="keep so many first numbers (Matryoshka); default: all"
    )
    prompt_name: Text | None = Field(
        None, description="which of the model's own prompts to put before each text"
    )
    normalize: bool | None = Field(
        None,
        validation_alias=AliasChoices("normalize", "use_activation"),
        description="give vectors of length 1; also `use_activation`; default: as the model's "
        "files have it, or true",
    )

    @model_validator(mode="after")
    def _check_inputs(self) -> EmbeddingRequest:
        check_count("input", len(self.input))
        if self.prompt_name is not None and not all(isinstance(one, str) for one in self.input):
            raise RequestError("prompt_name", "stands before texts, not before token ids")
        return self


class Document(GenerousModel):
    """A document to rank that is no plain text."""

    text: Text = Field(description="the document itself; other fields mean nothing")


Documents = Annotated[
    list[Text | Document], Field(min_length=1, fail_fast=True), at_most(MAX_INPUTS)
]
Texts = (
    NonEmptyText
    | Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True), at_most(MAX_INPUTS)]
)


class RerankRequest(PoolingRequest):
    """Body of /v1/rerank and its other spellings."""

    query: NonEmptyText = Field(description="what the documents are ranked by")
    documents: Documents = Field(description=f"texts, or objects with a text; {MAX_INPUTS} at most")
    top_n: int | None = Field(
        None, ge=0, description="give so many of the most relevant, 0 for all; default: all"
    )
    return_documents: bool | None = Field(
        None, description="give each document's text too; default true"
    )
    instruction: NonEmptyText | None = Field(None, description=INSTRUCTION)
    use_activation: bool | None = Field(None, description=ACTIVATION)
    max_tokens_per_doc: Annotated[Any, only()] = None
    max_chunks_per_doc: Annotated[Any, only()] = None
    rank_fields: Annotated[Any, only(["text"])] = None


class ScoreRequest(PoolingRequest):
    """Body of /score."""

    text_1: Texts = Field(
        validation_alias=AliasChoices("text_1", "queries", "data_1"),
        description="a query, or one for each of text_2; also `queries` or `data_1`",
    )
    text_2: Texts = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2"),
        description="a document, or several; also `documents`, `items` or `data_2`",
    )
    instruction: NonEmptyText | None = Field(None, description=INSTRUCTION)
    use_activation: bool | None = Field(None, description=ACTIVATION)

    @model_validator(mode="after")
    def _check_pairs(self) -> ScoreRequest:
        num_queries = 1 if isinstance(self.text_1, str) else len(self.text_1)
        num_documents = 1 if isinstance(self.text_2, str) else len(self.text_2)
        if num_queries not in (1, num_documents):
            raise RequestError(
                "text_1", f"must be one text, or as many as text_2 has: {num_documents}"
            )
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """A query and a document each."""
        documents = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        queries = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        if len(queries) == 1:
            queries = queries * len(documents)
        return list(zip(queries, documents, strict=True))


def check_count(field_name: str, count: int) -> None:
    """Refuse more inputs than one call may have."""
    if count > MAX_INPUTS:
        raise RequestError(field_name, f"must be at most {MAX_INPUTS} inputs, not {count}")
