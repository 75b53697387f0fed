"""Families whose layers keep states beside the KV blocks, at one and two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.kernels.reference.recurrence import ReferenceRecurrence
from autotp_serving.memory.footprint import MemorySetup
from autotp_serving.memory.planner import find_footprints
from autotp_serving.model.build import build_on_meta
from autotp_serving.model.loader import read_model_config
from autotp_serving.model.state_layers import allocate_states, list_state_layers
from tests.model.families import (
    COMMON,
    STATE_FAMILIES,
    generate_with_transformers,
    save_family,
)
from tests.model.test_quantized import save
from tests.ranks.test_families import IS_TRANSFORMERS_4, SETTINGS, make_prompts, run_jobs

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(IS_TRANSFORMERS_4, reason="has other layers, which are refused"),
]

MAX_TOKENS = 10


def ask_twice() -> list[list[int]]:
    """The longest prompt once more at the end, which then begins with a state that is kept."""
    prompts = make_prompts()
    return [*prompts, max(prompts, key=len)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("states")
    found = {name: save_family(name, root / name) for name in STATE_FAMILIES}
    for name in ("qwen3-5", "nemotron-h"):
        found[f"{name}-saved"] = root / f"{name}-saved"
        save(found[name], found[f"{name}-saved"], low_bit="sym_int4", dtype="float32")
    return found


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str | None, int], Any]:
    """By folder, --low-bit and number of ranks."""
    kinds = [(name, low_bit) for low_bit in ("bf16", "sym_int4") for name in STATE_FAMILIES]
    kinds += [(name, None) for name in folders if name.endswith("saved")]
    jobs = [
        {
            "model": str(folders[name]),
            "prompts": ask_twice()[:: 1 if low_bit == "bf16" else 3],
            "max_tokens": MAX_TOKENS,
            "settings": SETTINGS | {"low_bit": low_bit},
        }
        for name, low_bit in kinds
    ]
    found = {}
    for num_ranks in (1, 2):
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {(*kind, num_ranks): one for kind, one in zip(kinds, results, strict=True)}
    return found


@pytest.mark.parametrize("name", STATE_FAMILIES)
def test_tokens_equal_those_of_transformers(
    name: str, folders: dict[str, Path], answers: dict[tuple[str, str | None, int], Any]
) -> None:
    expected = generate_with_transformers(folders[name], ask_twice(), MAX_TOKENS)
    assert len({token for answer in expected for token in answer}) > 12, "answers that prove little"
    assert answers[name, "bf16", 1] == expected
    assert answers[name, "bf16", 2] == expected


@pytest.mark.parametrize("name", STATE_FAMILIES)
def test_low_bit_tokens_are_those_of_one_rank(
    name: str, answers: dict[tuple[str, str | None, int], Any]
) -> None:
    whole = answers[name, "sym_int4", 1]
    assert isinstance(whole, list), whole
    assert answers[name, "sym_int4", 2] == whole
    for num_ranks in (1, 2):
        assert answers.get((f"{name}-saved", None, num_ranks), whole) == whole


def test_preempted_sequences_and_equal_beginnings(folders: dict[str, Path], tmp_path: Path) -> None:
    """The cache is too small for three, and prompts begin alike: states must not be mixed up.

    Asked once more, each begins with a state that was kept.
    """
    folder = folders["qwen3-5"]
    long = make_prompts()[-1][:100]
    prompts = [long, [*long[:90], 5, 6, 7], long, [*long, 9]]
    max_tokens = 60
    expected = generate_with_transformers(folder, prompts, max_tokens)
    settings = SETTINGS | {"kv_cache_memory": 15 * 16 * 2 * 2 * 32 * 4, "low_bit": "bf16"}
    with LLM(str(folder), **settings) as llm:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        completions = llm.generate(prompts, params, show_progress=False)
        stats = llm._engine.stats()
        again = [llm.generate([one], params, show_progress=False)[0] for one in prompts]
        num_hits = llm._engine.stats().num_prefix_hit_tokens - stats.num_prefix_hit_tokens
    with pytest.raises(ConfigError, match=r"--kv-offload-dir: .* keep states"):
        LLM(str(folder), **settings, kv_offload_dir=str(tmp_path))
    assert [item.token_ids for item in completions] == expected
    assert stats.num_preemptions > 0, "nothing was preempted"
    assert [item.token_ids for item in again] == expected
    assert num_hits == 96 + 80 + 96 + 96


@pytest.mark.parametrize("reuses", [True, False])
def test_planned_states_are_those_allocated(folders: dict[str, Path], reuses: bool) -> None:
    """Of two sequences, one row more, and those that are kept, where any are."""
    config = ServingConfig(
        str(folders["qwen3-5"]), max_num_seqs=2, enable_prefix_caching=reuses, low_bit="bf16"
    )
    model_config = read_model_config(config)
    (planned,) = find_footprints(MemorySetup(config, 512, True), model_config)
    model = build_on_meta(model_config, torch.bfloat16, False)
    num_rows = 3 + (4 if reuses else 0)
    allocate_states(model, num_rows, torch.device("meta"), ReferenceRecurrence())
    pools = [pool for layer in list_state_layers(model) for pool in layer.pools]
    assert planned.state_bytes == sum(pool.nbytes for pool in pools) > 0


@pytest.mark.parametrize(
    ("name", "what"),
    [("qwen3-5", "2 key heads"), ("lfm2", "128 channels"), ("nemotron-h", "8 Mamba heads")],
)
def test_heads_that_do_not_divide_are_refused(name: str, what: str) -> None:
    config_class, settings = STATE_FAMILIES[name]
    config = getattr(transformers, config_class)(**(COMMON | settings))
    layers = list_state_layers(build_on_meta(config, torch.float32, False))
    assert layers
    for layer in layers:
        with pytest.raises(ConfigError, match=f"{what}.* over 3 ranks"):
            layer.plan_shares(3)
