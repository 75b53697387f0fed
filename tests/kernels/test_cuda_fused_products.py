"""Products with what follows them, beside the separate kernels: equal to the bit."""

from __future__ import annotations

import pytest
import torch

from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.tensor import quantize

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="there is no Hopper card here",
)

NAMES = [*FORMATS, None]
COLUMNS = 576


def make_weight(rows, name):
    from autotp_serving.kernels.cuda.tiles import tile

    weight = torch.randn(rows, COLUMNS, device="cuda") * 0.05
    return weight.bfloat16() if name is None else tile(quantize(weight, FORMATS[name]))


def draw(*sizes):
    return torch.randn(*sizes, device="cuda").bfloat16()


def make_input(num_tokens, name):
    """Activations as the format takes them."""
    from autotp_serving.kernels.cuda.activations import quantize_tokens
    from autotp_serving.kernels.cuda.products import rounding_of

    rounding = rounding_of(None if name is None else FORMATS[name], 1)
    return quantize_tokens(draw(num_tokens, COLUMNS), rounding)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_heads_are_those_of_two_kernels(name, num_tokens):
    from autotp_serving.kernels.cuda.activations import HeadsEnd, Rotation, rotate_and_store
    from autotp_serving.kernels.cuda.fused_products import multiply_heads
    from autotp_serving.kernels.cuda.products import multiply_activations

    torch.manual_seed(0)
    for head_dim, heads, kv_heads, has_bias in ((64, 6, 2, True), (128, 3, 1, False)):
        rows = (heads + 2 * kv_heads) * head_dim
        weight, x = make_weight(rows, name), make_input(num_tokens, name)
        bias = draw(rows) if has_bias else None
        rotation = Rotation(draw(40, head_dim), draw(40, head_dim), None, None, 0.0, bias)
        positions = torch.randint(40, (num_tokens,), device="cuda")
        slots = torch.randperm(32, device="cuda")[:num_tokens]
        slots[num_tokens // 2] = -1
        results = []
        for is_fused in (False, True):
            pools = tuple(
                torch.zeros(32, kv_heads, head_dim, device="cuda").bfloat16() for _ in "kv"
            )
            end = HeadsEnd(rotation, positions, heads, kv_heads, slots, pools)
            if is_fused:
                qkv = multiply_heads(x, weight, end)
            else:
                qkv = multiply_activations(x, weight)
                rotate_and_store(qkv, end)
            # Rows of keys and values that went to the cache are not written, or not rotated.
            stays = slots < 0
            rest = qkv[stays, heads * head_dim :]
            results.append((qkv[:, : heads * head_dim], rest, *pools))
        for part, (one, other) in enumerate(zip(*results, strict=True)):
            assert torch.equal(one, other), part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_gated_product_is_that_of_two_kernels(name, num_tokens, has_bias):
    from autotp_serving.kernels.cuda.activations import silu_multiply
    from autotp_serving.kernels.cuda.fused_products import multiply_gated
    from autotp_serving.kernels.cuda.products import multiply_activations, rounding_of

    torch.manual_seed(1)
    rows = 2 * 704
    weight, x = make_weight(rows, name), make_input(num_tokens, name)
    bias = draw(rows) if has_bias else None
    rounding = rounding_of(None if name is None else FORMATS[name], 1)
    expected = silu_multiply(multiply_activations(x, weight), bias, rounding)
    out = multiply_gated(x, weight, bias)
    if expected.plain is not None:
        assert torch.equal(out.plain, expected.plain)
        return
    for plane in ("codes", "scales", "sums"):
        one, other = getattr(out, plane), getattr(expected, plane)
        assert torch.equal(one[:, :, :num_tokens], other[:, :, :num_tokens]), plane
