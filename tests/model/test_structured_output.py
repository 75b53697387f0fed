"""Random logits, a real vocabulary, generated schemas: whatever comes, it parses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_serving.engine.grammar import GrammarCompiler
from autotp_serving.model.sampler import Sampler
from autotp_serving.plan import SampleInput
from autotp_serving.request import SamplingParams, Structure
from autotp_serving.tokenizer import HuggingFaceTokenizer

TOKENIZER = Path(__file__).parents[2] / "demo_model"
NUM_SCHEMAS = 100
MAX_TOKENS = 4000
NUM_FREE = 2


def make_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of nested objects, arrays and plain values, all of bounded size."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = draw.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "object":
        names = draw.sample(["id", "name", "é", 'a "b"', "x_y", "list", "n"], draw.randint(1, 5))
        return {
            "type": "object",
            "properties": {name: make_schema(draw, depth + 1) for name in names},
            "required": draw.sample(names, draw.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        least = draw.randint(0, 2)
        size = {"minItems": least, "maxItems": least + draw.randint(0, 3)}
        return {"type": "array", "items": make_schema(draw, depth + 1)} | size
    if kind == "anyOf":
        return {"anyOf": [make_schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]}
    return {
        "string": {"type": "string", "minLength": 1, "maxLength": draw.randint(2, 30)},
        "integer": {"type": "integer", "minimum": -5, "maximum": draw.randint(0, 5000)},
        "number": {"type": "number", "minimum": -1.5, "maximum": 100},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": ["a", 1, None, "\N{GRINNING FACE}", {"k": [1]}]},
        "const": {"const": draw.choice(["x", 7, True])},
        "pattern": {"type": "string", "pattern": "^[a-z]{1,5}-[0-9]{2}$"},
    }[kind]


def check(schema: dict[str, Any], value: Any) -> None:
    """Just enough of JSON Schema for what `make_schema` makes."""
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return check(option, value)
            except AssertionError:
                continue
        raise AssertionError(f"{value!r} is none of {schema}")
    if "enum" in schema:
        assert any(type(one) is type(value) and one == value for one in schema["enum"])
        return None
    if "const" in schema:
        assert type(value) is type(schema["const"]) and value == schema["const"]
        return None
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None), "object": dict, "array": list}  # fmt: skip
    assert isinstance(value, kinds[schema["type"]])
    if schema["type"] in ("integer", "number"):
        assert not isinstance(value, bool) and schema["minimum"] <= value <= schema["maximum"]
    if "maxLength" in schema:
        assert schema["minLength"] <= len(value) <= schema["maxLength"]
    if schema["type"] == "array":
        assert schema["minItems"] <= len(value) <= schema["maxItems"]
        for item in value:
            check(schema["items"], item)
    if schema["type"] == "object":
        assert set(schema["required"]) <= set(value) <= set(schema["properties"])
        for name, item in value.items():
            check(schema["properties"][name], item)
    return None


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(TOKENIZER)


def test_the_vocabulary_is_understood_byte_by_byte(tokenizer: HuggingFaceTokenizer) -> None:
    text = 'Héllo  wörld\n\t"{}" \N{EARTH GLOBE EUROPE-AFRICA} 12345 <|x|>'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in tokens) == text.encode()


def test_100_generated_schemas_parse_at_temperature_1(tokenizer: HuggingFaceTokenizer) -> None:
    """All in one batch, as the engine runs them, and two free answers beside them."""
    draw = random.Random(20)
    schemas = [make_schema(draw) for _ in range(NUM_SCHEMAS)]
    compiler = GrammarCompiler(tokenizer)
    futures = [compiler.submit(Structure("json_schema", json.dumps(one))) for one in schemas]
    guides = {number: future.result(60).start() for number, future in enumerate(futures)}
    texts: dict[int, list[int]] = {number: [] for number in guides}
    params = SamplingParams(temperature=1.0)
    # Some models like to go on writing blanks: this one likes little better.
    blanks = [
        token for token in range(tokenizer.vocab_size) if not tokenizer.token_bytes(token).strip()
    ]
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler()
    for _ in range(MAX_TOKENS):
        if not guides:
            break
        logits = torch.randn(len(guides) + NUM_FREE, tokenizer.vocab_size + 5, generator=generator)
        logits[:, blanks] += 3.0
        samples = []
        for guide in guides.values():
            samples.append(SampleInput(params, draw.random(), allowed=guide.allowed()))
        samples += [SampleInput(params, draw.random())] * NUM_FREE
        tokens = sampler.sample(logits, samples).token_ids[:-NUM_FREE]
        for number, token in zip(list(guides), tokens, strict=True):
            is_complete = guides[number].accept(token)
            assert guides[number].error is None
            if token not in tokenizer.eos_token_ids:
                texts[number].append(token)
            if is_complete:
                del guides[number]
    assert not guides, f"{len(guides)} answers do not come to an end"
    for number, schema in enumerate(schemas):
        check(schema, json.loads(tokenizer.decode(texts[number])))
