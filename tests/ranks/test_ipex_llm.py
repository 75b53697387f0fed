"""The server on ipex-llm's own layers, at one and two ranks; what it refuses, everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from autotp_serving import LLM
from autotp_serving.config import ConfigError, ServingConfig
from tests.model.checkpoints import save_tiny_llama
from tests.ranks.launch import run_jobs

INSTALLED = importlib.util.find_spec("ipex_llm") is not None
PROVIDER = {"low_bit_provider": "ipex-llm"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"), intermediate_size=768)


@pytest.mark.ranks
@pytest.mark.skipif(not INSTALLED, reason="ipex-llm is not installed")
def test_one_and_two_ranks_answer_alike(model_path: Path, tmp_path: Path) -> None:
    """ipex-llm rounds activations by blocks, which two ranks shard alike, so tokens are equal."""
    prompts = [list(range(3, 3 + length)) for length in (1, 20, 90)]
    settings = {"max_model_len": 192, "max_num_batched_tokens": 48, "dtype": "float32"}
    job = {"model": str(model_path), "prompts": prompts, "max_tokens": 8}
    jobs = [
        job | {"settings": settings | PROVIDER | {"low_bit": "sym_int4"}},
        job | {"settings": settings | {"low_bit": "bf16"}},
    ]
    one, two = (run_jobs(jobs, num_ranks, tmp_path) for num_ranks in (1, 2))
    assert isinstance(one[0], list), one[0]
    assert two == one
    assert one[0] != one[1], "nothing was converted"


@pytest.mark.skipif(INSTALLED, reason="ipex-llm is installed")
def test_a_missing_package_is_named(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--low-bit-provider ipex-llm: .*not installed"):
        LLM(str(model_path), **PROVIDER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="other formats are refused on CPU")
def test_a_format_that_ipex_llm_lacks_is_named(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--low-bit-provider ipex-llm: .*no 'nf4' on CPU"):
        LLM(str(model_path), low_bit="nf4", **PROVIDER)


def test_saving_is_ours_alone() -> None:
    with pytest.raises(ConfigError, match="--save-low-bit"):
        ServingConfig(model_path="x", save_low_bit="y", **PROVIDER)
