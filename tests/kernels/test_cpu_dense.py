"""Dense products of 16-bit numbers beside torch's, for each instruction set."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from autotp_serving.devices.build import ISAS, processor_flags
from autotp_serving.kernels.cpu import dense
from autotp_serving.kernels.cpu.dense import DenseMatmul, load_dense_library, pack
from autotp_serving.layers import dense_linear
from autotp_serving.layers.dense_linear import (
    DenseLinear,
    PackedEmbedding,
    take_over,
    take_over_linears,
)
from autotp_serving.layers.head import VocabParallelHead
from tests.compiler import needs_compiler

pytestmark = needs_compiler

SHAPES = [(1, 7), (17, 70), (33, 333), (48, 1024), (100, 1050), (16, 2048), (5, 4100)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not ISAS[request.param].needs <= processor_flags():
        pytest.skip(f"no {request.param} here")
    return request.param


def make_tensors(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right_and_do_not_depend_on_other_tokens(
    shape: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    weight = make_tensors(*shape, seed=1).to(dtype)
    x = make_tensors(70, shape[1] + 3, seed=2)[:, :-3].to(dtype)
    library = load_dense_library(isa)
    assert library is not None, "it does not compile: see the log"
    matmul = DenseMatmul(library, pack(library, weight))
    whole = matmul(x)
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T
    assert ((whole.double() - exact).abs() <= exact.abs() / 256 + bound * 1e-5 + 1e-30).all()
    for count in (1, 2, 7, 8, 9, 33):
        assert torch.equal(matmul(x[:count]), whole[:count])
    in_rows = DenseMatmul(library, weight)
    for count in (1, 70):
        assert torch.equal(in_rows(x[:count]), whole[:count])


def test_several_weights_are_one_product_whatever_the_threads() -> None:
    library = load_dense_library()
    weights = [pack(library, make_tensors(rows, 320, seed=rows)) for rows in (40, 16, 7)]
    x = make_tensors(3, 320, seed=0)
    expected = torch.cat([DenseMatmul(library, weight)(x) for weight in weights], 1)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(DenseMatmul(library, *weights)(x), expected)
        finally:
            torch.set_num_threads(before)


def test_float16_is_left_to_torch_only_where_it_has_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_tensors(40, 64, seed=1).half()
    for has_instructions in (True, False):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda found=has_instructions: found
        )
        assert (take_over(weight)[1] is None) == has_instructions


def test_bfloat16_is_left_to_the_tiles_of_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_tensors(40, 64, seed=1)
    monkeypatch.setattr(dense, "best_isa", lambda: "amx")
    assert take_over(weight) == (weight, None)


class AutoTpLinear(nn.Linear):
    """Stands in for DeepSpeed's, which is known by its name."""


AutoTpLinear.__name__ = "LinearAllreduce"


def test_layers_are_taken_over() -> None:
    plain, row_parallel = nn.Linear(64, 32).bfloat16(), AutoTpLinear(64, 32).bfloat16()
    whole = nn.Linear(64, 32)  # float32: torch's alone
    row_parallel.mp_group = object()
    model = nn.ModuleDict({"plain": plain, "row_parallel": row_parallel, "whole": whole})
    x = make_tensors(2, 3, 64, seed=5)
    expected = [nn.functional.linear(x, layer.weight) for layer in (plain, row_parallel)]
    biases = [plain.bias, row_parallel.bias]
    take_over_linears(model, lambda product: product.mul_(2))
    assert model["whole"] is whole
    assert isinstance(model["plain"], DenseLinear) and model["plain"].matmul is not None
    with torch.no_grad():
        torch.testing.assert_close(model["plain"](x), expected[0] + biases[0])
        torch.testing.assert_close(model["row_parallel"](x), expected[1] * 2 + biases[1])


class TiedModel(nn.Module):
    """An embedding and a second rank's head tied to it."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        size, hidden_size = embedding.weight.shape
        self.head = VocabParallelHead(
            hidden_size, size, False, torch.bfloat16, 1, 2, lambda logits: logits
        )
        self.head.gathers = False
        self.head.tie_to(embedding.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class ScaledEmbedding(nn.Embedding):
    """Does more than to look up."""


@pytest.mark.parametrize(
    ("kind", "size", "is_packed"),
    [(nn.Embedding, 96, True), (nn.Embedding, 90, False), (ScaledEmbedding, 96, False)],
)
def test_a_tied_head_shares_one_copy_with_the_embedding(
    kind: type[nn.Embedding], size: int, is_packed: bool
) -> None:
    model = TiedModel(kind(size, 72).bfloat16().requires_grad_(False))
    whole = model.embedding.weight
    token_ids = torch.tensor([[0, size - 1, 17], [5, 48, 5]])
    hidden = make_tensors(3, 72, seed=1)
    expected_rows, expected_logits = whole[token_ids], hidden @ whole[size // 2 :].T
    take_over_linears(model, lambda product: product)
    assert isinstance(model.embedding, PackedEmbedding) == is_packed
    assert torch.equal(model.embedding(token_ids), expected_rows)
    torch.testing.assert_close(model.head(hidden), expected_logits)
    assert sum(x.nbytes for x in model.buffers()) == (96 * 96 * 2 if is_packed else 0)


def test_weights_are_not_kept_beside_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {str(index): nn.Linear(64, 32).bfloat16() for index in range(3)}
    model = nn.ModuleDict(layers)
    del layers
    weights = [weakref.ref(layer.weight) for layer in model.values()]
    kept: list[int] = []
    monkeypatch.setattr(dense_linear, "TRIM_BYTES", 0)
    monkeypatch.setattr(
        dense_linear,
        "return_free_memory",
        lambda: kept.append(sum(weight() is not None for weight in weights)),
    )
    take_over_linears(model, lambda product: product)
    assert kept == [2, 1, 0, 0]
