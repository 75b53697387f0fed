"""Dense products of 16-bit numbers beside torch's, for each instruction set."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from torch import nn

from autotp_serving.devices.build import ISAS, processor_flags
from autotp_serving.kernels.cpu import dense
from autotp_serving.kernels.cpu.dense import DenseMatmul, load_dense_library, sums_like_torch
from autotp_serving.layers import dense_linear
from autotp_serving.layers.dense_linear import DenseKernels, DenseLinear, take_over_linears
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
    matmul = DenseMatmul(library, weight)
    whole = matmul.multiply_few(x)
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T
    assert ((whole.double() - exact).abs() <= exact.abs() / 256 + bound * 1e-5 + 1e-30).all()
    for count in (1, 2, 7, 8, 9, 33):
        assert torch.equal(matmul.multiply_few(x[:count]), whole[:count])


def test_several_weights_are_one_product_whatever_the_threads() -> None:
    weights = [make_tensors(rows, 320, seed=rows) for rows in (40, 16, 7)]
    x = make_tensors(3, 320, seed=0)
    library = load_dense_library()
    expected = torch.cat([DenseMatmul(library, weight)(x) for weight in weights], 1)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(DenseMatmul(library, *weights)(x), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("cols", [2048, 1050])
def test_a_weight_in_its_place_is_the_same(cols: int) -> None:
    weight, x = make_tensors(40, cols, seed=1), make_tensors(3, cols, seed=2)
    library = load_dense_library()
    placed = dense.place(weight)
    assert torch.equal(placed, weight) and placed.stride(0) % 2048
    assert torch.equal(DenseMatmul(library, placed)(x), DenseMatmul(library, weight)(x))


@pytest.mark.parametrize("cols", [2600, 1408, 1024, 704])
def test_few_and_many_tokens_get_the_same_results(cols: int) -> None:
    """What torch and the kernel sum in the same order: 1,024 columns at a time, or 512."""
    weight = make_tensors(300, cols, seed=3)
    matmul = DenseKernels().make_matmul(weight)
    if matmul is None:
        pytest.skip("torch sums otherwise here, and so multiplies alone")
    x = make_tensors(matmul.most_tokens + 1, cols, seed=4)
    whole = matmul(x)
    assert torch.equal(whole, nn.functional.linear(x, weight))
    for count in (1, 5, matmul.most_tokens):
        assert torch.equal(matmul(x[:count]), whole[:count])


def test_float16_is_left_to_torch_only_where_it_has_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_tensors(40, 64, seed=1).half()
    for has_instructions in (True, False):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda found=has_instructions: found
        )
        assert (DenseKernels().make_matmul(weight) is None) == has_instructions


def test_a_kernel_that_sums_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = make_tensors(300, 2600, seed=3)
    library = load_dense_library()

    def multiply_in_one_sum(matmul: DenseMatmul, x: torch.Tensor) -> torch.Tensor:
        halves = [matmul._tensors[0][:, :1300], matmul._tensors[0][:, 1300:]]
        parts = zip(x.split(1300, 1), halves, strict=True)
        return sum(part.float() @ half.float().T for part, half in parts).bfloat16()

    monkeypatch.setattr(dense.DenseMatmul, "multiply_few", multiply_in_one_sum)
    assert not sums_like_torch(DenseMatmul(library, weight))
    with caplog.at_level(logging.INFO):
        assert DenseKernels().make_matmul(weight) is None
    assert "(300, 2600)" in caplog.text


class AutoTpLinear(nn.Linear):
    """Stands in for DeepSpeed's, which is known by its name."""


AutoTpLinear.__name__ = "LinearAllreduce"


def test_layers_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_linear, "sums_like_torch", lambda matmul: True)
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
        assert torch.equal(model["plain"](x), expected[0] + biases[0])
        assert torch.equal(model["row_parallel"](x), expected[1] * 2 + biases[1])


def test_weights_are_not_kept_beside_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {str(index): nn.Linear(64, 32).bfloat16() for index in range(3)}
    model = nn.ModuleDict(layers)
    del layers
    weights = [weakref.ref(layer.weight) for layer in model.values()]
    kept: list[int] = []
    monkeypatch.setattr(dense_linear, "sums_like_torch", lambda matmul: True)
    monkeypatch.setattr(dense_linear, "TRIM_BYTES", 0)
    monkeypatch.setattr(
        dense_linear,
        "return_free_memory",
        lambda: kept.append(sum(weight() is not None for weight in weights)),
    )
    take_over_linears(model, lambda product: product)
    assert kept == [2, 1, 0, 0]
