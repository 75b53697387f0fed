"""The demo model at temperature 1, which has never seen a tool: its calls fit all the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from autotp_serving import LLM, SamplingParams, StructuredOutput
from autotp_serving.api.openai.completion_parser import join
from autotp_serving.api.openai.tool_calls import ToolCallParser
from autotp_serving.structured_output import CallableTool, ToolCalls
from tests.generated_schemas import check, make_schema

DEMO = Path(__file__).parents[2] / "demo_model"
NUM_TOOLS = 6
MAX_TOKENS = 1000


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO), low_bit="bf16", max_model_len=2048, kv_cache_memory=64 * 2**20) as llm:
        yield llm


@pytest.mark.parametrize("tool_format", ["hermes", "llama3", "kimi_k2"])
def test_calls_fit_generated_schemas_at_temperature_1(llm: LLM, tool_format) -> None:
    rng = random.Random(4)
    schemas = {f"f{n}": {"type": "object", "properties": {"a": make_schema(rng, 1)},
                         "required": ["a"], "additionalProperties": False}
               for n in range(NUM_TOOLS)}  # fmt: skip
    tools = [CallableTool(name, json.dumps(schema), True) for name, schema in schemas.items()]
    # Each tool alone, as one that is named, and all together, as where one is required.
    choices = [(tool,) for tool in tools] + [tuple(tools)] * 2
    params = [
        SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            seed=number,
            structured_output=StructuredOutput(
                "text", calls=ToolCalls(tool_format, chosen, True, True)
            ),
        )
        for number, chosen in enumerate(choices)
    ]
    answers = llm.generate(["What is AI?"] * len(params), params, show_progress=False)
    for chosen, answer in zip(choices, answers, strict=True):
        assert answer.finish_reason == "stop", answer.error
        parser = ToolCallParser(tool_format, {tool.name: None for tool in chosen})
        message = join([*parser.add(answer.text), *parser.end()])
        assert message["content"] is None
        (call,) = message["tool_calls"]
        check(schemas[call["function"]["name"]], json.loads(call["function"]["arguments"]))
