"""Products on a CUDA card against float64, and a token alone as among others."""

from __future__ import annotations

import pytest
import torch

from autotp_serving.kernels.cuda.activations import Rounding
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.tensor import dequantize, quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card here")


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """What 8-bit codes with a scale per 64 stand for, in float64."""
    blocks = x.float().view(len(x), -1, 64)
    peak = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127.0 / peak)).round().nan_to_num(0.0)
    return (codes.double() * (peak / 127.0).double()).view(len(x), -1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1056, 1408), (200, 512)])
def test_products_are_those_of_the_reference(name, rows, columns):
    from autotp_serving.kernels.cuda.products import multiply, rounding_of
    from autotp_serving.kernels.cuda.tiles import tile

    torch.manual_seed(0)
    canonical = quantize(torch.randn(rows, columns, device="cuda") * 0.02, FORMATS[name])
    x = torch.randn(1000, columns, device="cuda", dtype=torch.bfloat16)
    x[3] = 0
    dense = dequantize(canonical).double().t()
    is_rounded = rounding_of(canonical.format, 1) is not Rounding.NONE
    reference = (round_activations(x) if is_rounded else x.double()) @ dense
    weight = tile(canonical)
    alone = multiply(x[:1], weight)
    for num_tokens in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 257, 300, 1000):
        out = multiply(x[:num_tokens], weight).double()
        error = (out - reference[:num_tokens]).norm() / reference[:num_tokens].norm()
        # Tables are of 8-bit integers, as on the CPU: nf4's are off by up to 0.2 % of the largest.
        assert error < (8e-3 if FORMATS[name].kind == "table" else 4e-3), num_tokens
        if num_tokens <= 16:
            assert torch.equal(out[:1], alone.double()), num_tokens


def test_not_finite_activations_spoil_their_own_token_only():
    from autotp_serving.kernels.cuda.products import multiply
    from autotp_serving.kernels.cuda.tiles import tile

    weight = tile(quantize(torch.randn(64, 128, device="cuda"), FORMATS["sym_int4"]))
    x = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)
    clean = multiply(x, weight)
    x[2, 5] = float("inf")
    out = multiply(x, weight)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("name", [*FORMATS, None])
def test_experts_multiply_the_tokens_that_are_sent_to_them(name):
    from autotp_serving.kernels.cuda.activations import quantize_tokens
    from autotp_serving.kernels.cuda.experts import group_pairs, multiply_experts
    from autotp_serving.kernels.cuda.products import rounding_of
    from autotp_serving.kernels.cuda.tiles import tile

    torch.manual_seed(0)
    num_experts, rows, columns, num_chosen = 24, 192, 512, 4
    weight = torch.randn(num_experts * rows, columns, device="cuda").bfloat16() * 0.02
    dense, format = weight.double(), None
    if name is not None:
        format, canonical = FORMATS[name], quantize(weight.float(), FORMATS[name])
        weight, dense = tile(canonical), dequantize(canonical).double()
    dense = dense.view(num_experts, rows, columns)
    all_tokens = torch.randn(900, columns, device="cuda", dtype=torch.bfloat16)
    routes = torch.rand(900, num_experts, device="cuda").topk(num_chosen).indices
    routes[:100, 0] = 5
    rounding = rounding_of(format, 1)
    alone = None
    for num_tokens in (1, 2, 7, 33, 64, 300, 900):
        x, chosen = all_tokens[:num_tokens], routes[:num_tokens].contiguous()
        groups = group_pairs(chosen, num_experts)
        out = multiply_experts(quantize_tokens(x, rounding), weight, num_experts, groups)
        seen = round_activations(x) if rounding is Rounding.INTEGERS else x.double()
        expected = torch.einsum("tc,tkrc->tkr", seen, dense[chosen])
        out = out.view(num_tokens, num_chosen, rows)
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (8e-3 if format and format.kind == "table" else 4e-3), num_tokens
        pairs = quantize_tokens(x.repeat_interleave(num_chosen, 0), rounding)
        again = multiply_experts(pairs, weight, num_experts, groups).view_as(out)
        assert torch.equal(again, out), "a pair's own row gave something else than its token's"
        alone = out[0] if alone is None else alone
        if num_tokens <= 7:
            assert torch.equal(out[0], alone), num_tokens
