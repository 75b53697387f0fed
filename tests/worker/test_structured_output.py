"""Random logits, a real vocabulary, generated schemas: whatever comes, it parses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from autotp_serving.batch import SampleInput
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.request import SamplingParams
from autotp_serving.structured_output import StructuredOutput
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.step_logits import StepLogits
from tests.generated_schemas import check, make_schema

FETCH = CpuDevice(0).fetch

TOKENIZER = Path(__file__).parents[2] / "demo_model"
NUM_SCHEMAS = 100
MAX_TOKENS = 4000
NUM_FREE = 2


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(TOKENIZER)


def test_the_vocabulary_is_understood_byte_by_byte(tokenizer: HuggingFaceTokenizer) -> None:
    text = 'Héllo  wörld\n\t"{}" \N{EARTH GLOBE EUROPE-AFRICA} 12345 <|x|>'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in tokens) == text.encode()


def test_100_generated_schemas_parse_at_temperature_1(tokenizer: HuggingFaceTokenizer) -> None:
    """All in one batch, as the engine runs them, and two free completions beside them."""
    rng = random.Random(20)
    schemas = [make_schema(rng) for _ in range(NUM_SCHEMAS)]
    compiler = GrammarCompiler(tokenizer)
    futures = [compiler.submit(StructuredOutput("json_schema", json.dumps(one))) for one in schemas]
    guides = {number: future.result(60).start() for number, future in enumerate(futures)}
    texts: dict[int, list[int]] = {number: [] for number in guides}
    params = SamplingParams(temperature=1.0)
    # Some models like to go on writing blanks: this one likes little better.
    blanks = [
        token for token in range(tokenizer.vocab_size) if not tokenizer.token_bytes(token).strip()
    ]
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(FETCH)
    for _ in range(MAX_TOKENS):
        if not guides:
            break
        logits = torch.randn(len(guides) + NUM_FREE, tokenizer.vocab_size + 5, generator=generator)
        logits[:, blanks] += 3.0
        samples = []
        for guide in guides.values():
            samples.append(SampleInput(params, rng.random(), allowed=guide.allowed()))
        samples += [SampleInput(params, rng.random())] * NUM_FREE
        tokens = sampler.sample(StepLogits(logits), samples).token_ids.tolist()[:-NUM_FREE]
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
