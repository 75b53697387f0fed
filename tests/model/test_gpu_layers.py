"""The quick pass on a card: which tokens its last layer runs. Torch stands in for the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp_serving.kernels.cuda.activations import Activations, HeadsEnd, Rotation, Rounding
from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.model import gpu_layers, gpu_mlp, gpu_products
from autotp_serving.model.fused_layers import Norm
from autotp_serving.model.gpu_forward import GpuForward
from autotp_serving.model.gpu_products import Product
from autotp_serving.model.gpu_sums import Addend

SIZE, HEADS, HEAD_DIM, VOCAB, TOKENS = 64, 2, 32, 50, 7


def activate(x: Tensor) -> Activations:
    return Activations(*x.shape, x)


def add_norm(hidden: Tensor, added: Addend | None, norm: Norm, rounding: Rounding) -> Activations:
    if added is not None:
        hidden += added.part
    return activate(functional.rms_norm(hidden, (SIZE,), norm.weight, norm.epsilon))


def rotate_and_store(qkv: Tensor, end: HeadsEnd) -> None:
    _, key, value = qkv.view(len(qkv), 3, HEADS, HEAD_DIM).unbind(1)
    end.pools[0][end.slots], end.pools[1][end.slots] = key, value


def attend(query: Tensor, pools: Pools, inputs: SimpleNamespace, *rest: object) -> None:
    """Every token sees those before it, as if all products were alike."""
    out = rest[-2]
    out.copy_(query * pools.values[inputs.slots].cumsum(0))


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> GpuForward:
    torch.manual_seed(0)
    monkeypatch.setattr(gpu_products, "multiply_activations", lambda x, w: x.plain @ w.t())
    monkeypatch.setattr(gpu_layers, "quantize_tokens", lambda x, rounding: activate(x))
    monkeypatch.setattr(gpu_layers, "can_rotate", lambda *rest: False)
    monkeypatch.setattr(gpu_layers, "rotate_and_store", rotate_and_store)
    monkeypatch.setattr(gpu_layers.triton_attention, "prefill", attend)
    monkeypatch.setattr(gpu_mlp, "can_gate", lambda *rest: False)
    monkeypatch.setattr(
        gpu_mlp, "silu_multiply", lambda x, *rest: activate(x[:, :SIZE].sigmoid() * x[:, SIZE:])
    )

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64) / 8

    norm = Norm(torch.ones(SIZE, dtype=torch.float64), 1e-6)
    rotation = Rotation(draw(TOKENS, HEAD_DIM), draw(TOKENS, HEAD_DIM), None, None, 0.0, None)

    def make_layer() -> gpu_layers.GpuLayer:
        return gpu_layers.GpuLayer(
            input_norm=norm,
            qkv=Product(draw(3 * SIZE, SIZE), None),
            rotation=rotation,
            output=Product(draw(SIZE, SIZE), None),
            mlp_norm=norm,
            mlp=gpu_mlp.GatedMlp(
                Product(draw(2 * SIZE, SIZE), None), Product(draw(SIZE, SIZE), None)
            ),
            pools=Pools(*torch.zeros(2, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)),
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            scaling=1.0,
            sliding_window=None,
            add_norm=add_norm,  # type: ignore[arg-type]
            workspace=None,  # type: ignore[arg-type]
        )

    made = GpuForward.__new__(GpuForward)
    made._layers = [make_layer(), make_layer()]
    made._embedding = nn.Embedding(VOCAB, SIZE, dtype=torch.float64)
    made._add_norm, made._norm = add_norm, norm  # type: ignore[assignment]
    made._head = SimpleNamespace(gather=lambda logits: logits)  # type: ignore[assignment]
    made._head_product = Product(draw(VOCAB, SIZE), None)
    made._vocab_size = VOCAB
    return made


@torch.inference_mode()
def run(forward: GpuForward, logit_rows: list[int]) -> tuple[Tensor, Tensor]:
    """Logits, and the keys and values of the last layer."""
    pools = forward._layers[-1].pools
    for pool in pools.tensors:
        pool.zero_()
    tokens = torch.arange(TOKENS)
    inputs = SimpleNamespace(
        token_ids=tokens,
        positions=tokens,
        slots=tokens,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        is_padded=False,
        is_decode=False,
    )
    return forward._run(inputs), torch.stack(pools.tensors)  # type: ignore[arg-type]


def test_the_last_layer_runs_tokens_whose_logits_are_wanted(forward: GpuForward) -> None:
    every, cached = run(forward, list(range(TOKENS)))
    assert every.shape == (TOKENS, VOCAB) and cached.any(-1).all()
    for rows in ([2, 6], [6], [5, 0, 0], []):
        logits, stored = run(forward, rows)
        torch.testing.assert_close(logits, every[rows])
        torch.testing.assert_close(stored, cached)
