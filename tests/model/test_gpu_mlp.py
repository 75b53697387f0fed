"""A gated MLP on a card: which kernels it asks for. No card is needed."""

from __future__ import annotations

import pytest

from autotp_serving.kernels.cuda.activations import Rounding
from autotp_serving.model import gpu_mlp


class FakeProduct:
    """Gives back what it is given."""

    weight = bias = None

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding

    def rounding(self, num_tokens: int) -> Rounding:
        return self._rounding

    def __call__(self, x: object) -> object:
        return x


@pytest.mark.parametrize("of_down", [Rounding.NONE, Rounding.INTEGERS])
def test_gate_and_down_of_other_formats_are_not_one_kernel(
    monkeypatch: pytest.MonkeyPatch, of_down: Rounding
) -> None:
    gate_up, down = FakeProduct(Rounding.INTEGERS), FakeProduct(of_down)
    monkeypatch.setattr(gpu_mlp, "can_gate", lambda weight, num_tokens: True)
    monkeypatch.setattr(gpu_mlp, "multiply_gated", lambda x, weight, bias: "together")
    monkeypatch.setattr(gpu_mlp, "silu_multiply", lambda x, bias, rounding: ("apart", rounding))
    mlp = gpu_mlp.GatedMlp(gate_up, down)  # type: ignore[arg-type]
    expected = "together" if of_down is Rounding.INTEGERS else ("apart", of_down)
    assert mlp.run(lambda rounding: "x", 1) == expected  # type: ignore[arg-type, return-value]
