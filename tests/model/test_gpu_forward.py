"""The quick pass on a CUDA card beside the CPU's, and graphs beside the steps they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotp_serving.config import ServingConfig
from autotp_serving.plan import StepPlan
from autotp_serving.ranks import join_control

DEMO = str(Path(__file__).parents[2] / "demo_model")
BLOCK_SIZE = 16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card here")


def start(device: str, low_bit: str, **settings):
    from autotp_serving.worker import start_worker

    config = ServingConfig(
        model_path=DEMO,
        device=device,
        low_bit=low_bit,
        max_model_len=512,
        max_num_batched_tokens=512,
        kv_cache_memory=2**28,
        **settings,
    )
    return start_worker(config, join_control({}))


def make_plan(parts: list[tuple[int, int]]) -> StepPlan:
    """(tokens before, tokens to run) of each sequence, in pages of its own; all logits wanted."""
    token_ids, positions, slots, tables = [], [], [], []
    for number, (before, length) in enumerate(parts):
        table = list(range(number * 32, number * 32 + -(-(before + length) // BLOCK_SIZE)))
        for position in range(before, before + length):
            token_ids.append((position * 7919 + number * 101 + 37) % 8000)
            positions.append(position)
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        tables.append(table)
    lens = [length for _, length in parts]
    ends = [before + length for before, length in parts]
    return StepPlan(token_ids, positions, slots, lens, ends, tables, list(range(sum(lens))))


STEPS = (
    [(0, 300)],
    [(300, 1), (0, 60)],
    [(301, 1), (60, 1)],
    [(302, 1), (61, 30), (0, 5)],
    [(303, 1), (91, 1), (5, 1)],
)


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4", "sym_int8", "fp8_e4m3", "nf4"])
def test_logits_are_near_the_cpus(low_bit):
    on_cpu, on_card = start("cpu", low_bit), start("cuda", low_bit)
    assert type(on_card.runner._forward).__name__ == "GpuForward"
    for parts in STEPS:
        plan = make_plan(parts)
        expected = on_cpu.runner.run(plan).float()
        got = on_card.runner.run(plan).float().cpu()
        # Eight bits of a bfloat16 through six layers, and activations that fall on either side of
        # a rounding to integers.
        assert (got - expected).norm() / expected.norm() < 0.08


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4"])
def test_graphs_give_what_the_same_steps_give_without(low_bit):
    with_graphs = start("cuda", low_bit, max_num_seqs=4)
    without = start("cuda", low_bit, max_num_seqs=4, enforce_eager=True)
    assert list(with_graphs.runner._forward._graphs) == [1, 2, 4]
    assert without.runner._forward._graphs == {}
    for parts in STEPS:
        plan = make_plan(parts)
        got, expected = with_graphs.runner.run(plan), without.runner.run(plan)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.02


def test_batch_sizes_of_graphs():
    from autotp_serving.model.gpu_forward import find_batch_sizes

    assert find_batch_sizes(1) == [1]
    assert find_batch_sizes(6) == [1, 2, 4, 6]
    assert find_batch_sizes(33) == [1, 2, 4, 8, 16, 24, 32, 33]
    assert find_batch_sizes(256)[-3:] == [224, 240, 256]
