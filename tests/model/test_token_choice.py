"""Indexers that choose the tokens that attention sees, among those in the blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.model import token_choice
from scripts.family_sweep import MAX_TOKENS, SETTINGS, make_prompts, make_somehow
from tests.ranks.test_families import IS_TRANSFORMERS_4

pytestmark = pytest.mark.skipif(IS_TRANSFORMERS_4, reason="has no sparse attention")

PARAMS = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_queries_in_parts_choose_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Prompts at once; then with every query alone, behind what the cache has of the prompt."""
    expected = make_somehow("glm_moe_dsa", tmp_path)
    with LLM(str(tmp_path), **SETTINGS, kv_cache_dtype=dtype) as llm:
        prompts = make_prompts()
        found = [one.token_ids for one in llm.generate(prompts, PARAMS, show_progress=False)]
        monkeypatch.setattr(token_choice, "MAX_SCORE_BYTES", 1)
        again = [one.token_ids for one in llm.generate(prompts, PARAMS, show_progress=False)]
        assert llm._engine.stats().num_prefix_hit_tokens == 16 + 32 + 64
    assert again == found
    assert dtype == "int8" or found == expected


def test_tokens_that_transformers_would_not_choose_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_somehow("glm_moe_dsa", tmp_path)
    update = token_choice._IndexerKeys.update_indexer

    def forget(self: token_choice._IndexerKeys, keys: torch.Tensor, layer: int) -> torch.Tensor:
        return update(self, keys, layer).roll(1, dims=1)

    monkeypatch.setattr(token_choice._IndexerKeys, "update_indexer", forget)
    with pytest.raises(ConfigError, match="GlmMoeDsaIndexer chooses other tokens here"):
        LLM(str(tmp_path), **SETTINGS)
