"""The quick pass on a CUDA card beside the CPU's, and graphs beside the steps they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotp_serving.batch import Batch
from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import join_group
from autotp_serving.layers import low_bit_linear
from tests.model.families import save_family

DEMO = str(Path(__file__).parents[2] / "demo_model")
BLOCK_SIZE = 16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card here")


def start(device: str, low_bit: str, model_path: str = DEMO, **settings):
    from autotp_serving.worker.worker import start_worker

    config = ServingConfig(
        model_path=model_path,
        device=device,
        low_bit=low_bit,
        max_model_len=512,
        max_num_batched_tokens=512,
        kv_cache_memory=2**28,
        **settings,
    )
    return start_worker(config, join_group({}))


def make_batch(parts: list[tuple[int, int]], num_ids: int = 8000) -> Batch:
    """(tokens before, tokens to run) of each sequence, in blocks of its own; all logits wanted."""
    token_ids: list[int] = []
    num_blocks, blocks = [], []
    for number, (before, length) in enumerate(parts):
        count = -(-(before + length) // BLOCK_SIZE)
        num_blocks.append(count)
        blocks += range(number * 32, number * 32 + count)
        token_ids += [
            (position * 7919 + number * 101 + 37) % num_ids
            for position in range(before, before + length)
        ]
    rows = list(range(len(parts)))
    lens = [length for _, length in parts]
    is_decode = max(lens) == 1
    return Batch(
        rows=rows,
        starts=[before for before, _ in parts],
        query_lens=lens,
        num_known=lens,
        token_ids=token_ids,
        grown=rows,
        first_blocks=[0] * len(rows),
        num_new_blocks=num_blocks,
        new_blocks=blocks,
        sampled=rows if is_decode else [],
        score_rows=[] if is_decode else list(range(sum(lens))),
    )


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
        batch = make_batch(parts)
        expected = on_cpu.runner.run(batch).whole.float()
        got = on_card.runner.run(batch).whole.float().cpu()
        # Eight bits of a bfloat16 through six layers, and activations that fall on either side of
        # a rounding to integers.
        assert (got - expected).norm() / expected.norm() < 0.08


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4", "fp8_e4m3"])
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_mixtures_of_experts(tmp_path, monkeypatch, family, low_bit):
    folder = str(save_family(family, tmp_path, torch_dtype="bfloat16"))
    on_cpu, on_card = start("cpu", low_bit, folder), start("cuda", low_bit, folder)
    assert type(on_card.runner._forward).__name__ == "GpuForward"
    # These layers blow up what differs: integers may differ as much as rounding to them changes.
    monkeypatch.setattr(low_bit_linear, "load_library", lambda format: None)
    unrounded = start("cpu", low_bit, folder) if low_bit == "sym_int4" else None
    for parts in STEPS:
        batch = make_batch(parts, num_ids=300)
        expected = on_cpu.runner.run(batch).whole.float()
        got = on_card.runner.run(batch).whole.float().cpu()
        errors = find_errors(got, expected)
        limit = 0.05
        if unrounded is not None:
            noise = find_errors(unrounded.runner.run(batch).whole.float(), expected)
            limit = max(limit, noise.median())
        assert errors.median() < limit
        # A token near the border of two experts may be sent to the other one.
        assert (errors < 4 * limit).float().mean() > 0.7


def find_errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far logits [rows, vocabulary] are from the expected ones, as shares of their length."""
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4"])
def test_graphs_give_what_the_same_steps_give_without(low_bit):
    with_graphs = start("cuda", low_bit, max_num_seqs=4)
    without = start("cuda", low_bit, max_num_seqs=4, enforce_eager=True)
    assert list(with_graphs.runner._forward._graphs) == [1, 2, 4, 8, 16, 20]  # with drafts
    assert without.runner._forward._graphs == {}
    for parts in STEPS:
        batch = make_batch(parts)
        got, expected = with_graphs.runner.run(batch).whole, without.runner.run(batch).whole
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.02


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_drafts_have_the_logits_of_steps_of_their_own(low_bit, enforce_eager):
    """To the bit in steps of few tokens."""
    runner = start("cuda", low_bit, enforce_eager=enforce_eager).runner
    runner.run(make_batch([(0, 60)]))
    expected = [runner.run(make_batch([(60 + n, 1)])).whole.clone() for n in range(5)]
    batch = make_batch([(60, 5)])
    batch.sampled, batch.score_rows, batch.num_drafts = [0], [], [4]
    assert torch.equal(runner.run(batch).whole, torch.cat(expected))
    batch = make_batch([(60, 5), (0, 30)])  # with a prompt beside them
    batch.sampled, batch.score_rows, batch.num_drafts = [0, 1], [], [4, 0]
    got, expected = runner.run(batch).whole[:5].float(), torch.cat(expected).float()
    # Activations may fall on either side of a rounding to integers.
    assert (got - expected).norm() / expected.norm() < 0.08


def test_batch_sizes_of_graphs():
    from autotp_serving.model.gpu_forward import find_batch_sizes

    assert find_batch_sizes(1) == [1]
    assert find_batch_sizes(6) == [1, 2, 4, 6]
    assert find_batch_sizes(33) == [1, 2, 4, 8, 16, 24, 32, 33]
    assert find_batch_sizes(256)[-3:] == [224, 240, 256]
