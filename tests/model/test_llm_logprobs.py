"""Logprobs through the whole stack, teacher-forced, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autotp_serving import LLM, SamplingParams, StructuredOutput
from autotp_serving.engine.grammar import GrammarError
from tests.model.checkpoints import save_tiny_llama

PROMPTS = [list(b"What is AI? " * 3), [5], list(range(200)), list(b"What is AI? " * 3 + b"?")]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def llm(model_path: Path):
    settings = {
        "low_bit": "bf16",
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "kv_cache_memory": 32 * 2**20,
    }
    with LLM(str(model_path), **settings) as llm:
        yield llm


def expected_logprobs(model_path: Path, tokens: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size], row i for token i + 1."""
    model = AutoModelForCausalLM.from_pretrained(model_path).float()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_prompt_and_answer_logprobs_equal_log_softmax(llm: LLM, model_path: Path) -> None:
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 3, "frequency_penalty": 1.0, "logit_bias": {7: 5.0}},
        {"temperature": 0.0, "repetition_penalty": 1.5, "min_tokens": 9},
        {"max_tokens": 0},
    ]
    params = [
        SamplingParams(**({"max_tokens": 9} | changes), logprobs=4, prompt_logprobs=2, seed=1)
        for changes in settings
    ]
    for prompt, one in zip(
        PROMPTS, llm.generate(PROMPTS, params, show_progress=False), strict=True
    ):
        tokens = prompt + one.token_ids
        expected = expected_logprobs(model_path, tokens)
        found = [*one.prompt_logprobs, *one.logprobs]
        assert [item.token_id for item in found] == tokens[1:]
        for row, item in enumerate(found):
            assert item.logprob == pytest.approx(expected[row, tokens[row + 1]].item(), abs=2e-4)
            num_top = 2 if row < len(prompt) - 1 else 4
            top = expected[row].topk(num_top).values.tolist()
            assert [logprob for _, logprob in item.top] == pytest.approx(top, abs=2e-4)


def test_penalties_and_seeds_alone_and_in_a_crowd(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=20, temperature=1.0, seed=1, repetition_penalty=1.3),
        SamplingParams(max_tokens=20, temperature=0.9, seed=2, frequency_penalty=0.9, min_p=0.05),
        SamplingParams(max_tokens=20, temperature=1.2, seed=3, presence_penalty=-1.0, top_p=0.8),
        SamplingParams(max_tokens=20, temperature=1.0, seed=4, logit_bias={3: 4.0}, min_tokens=9),
    ]
    alone = [
        llm.generate([prompt], one, show_progress=False)[0].token_ids
        for prompt, one in zip(PROMPTS, params, strict=True)
    ]
    crowd = [SamplingParams(max_tokens=30, temperature=1.0, presence_penalty=1.0)] * 6
    prompts = [*PROMPTS[:2], *[[number, 9, 9] for number in range(6)], *PROMPTS[2:]]
    mixed = llm.generate(prompts, [*params[:2], *crowd, *params[2:]], show_progress=False)
    assert [one.token_ids for one in (*mixed[:2], *mixed[-2:])] == alone
    processors = llm._engine._runner._sampler._logits_processors
    assert processors._counts.num_requests == len(processors._biases) == 0


def test_structures_beside_free_answers(llm: LLM) -> None:
    """The model's vocabulary is larger than the tokenizer's: no mask lets its padding through."""
    form = SamplingParams(
        max_tokens=40, temperature=5.0, structured_output=StructuredOutput("regex", "[0-9]{9}a")
    )
    free = SamplingParams(max_tokens=40, temperature=5.0, ignore_eos=True)
    for one in llm.generate([[5]] * 6, [form, free] * 3, show_progress=False)[::2]:
        assert one.finish_reason == "stop" and len(one.text) == 10
        assert one.text[:9].isdigit() and one.text[9] == "a"
    with pytest.raises(GrammarError, match="unclosed group"):
        llm.generate(
            [[5]],
            SamplingParams(structured_output=StructuredOutput("regex", "(")),
            show_progress=False,
        )
