"""A Llama for training: the arithmetic of transformers' LlamaForCausalLM, stacked by layer.

Weights of all layers that share a shape live in one tensor. The optimizer then treats each kind
of matrix in one batched product, and gradients cross GPUs in a handful of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """The size of the model; the names are those of a Llama config.json."""

    vocab_size: int = 8192
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 1408
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalizes in float32 and returns x's own dtype, as transformers does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding on [batch, length, heads, head_dim], halves rotated as one."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Llama(nn.Module):
    """Computes the weighted loss of packed rows in bfloat16 from float32 weights."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
        heads = shape.q_size

        def matrices(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(layers, rows, columns) * scale * columns**-0.5)

        quiet = 0.3 * (2 * layers) ** -0.5  # what writes to the residual stream starts small
        self.embed = nn.Parameter(torch.randn(shape.vocab_size, hidden) * 0.02)
        self.norms = nn.Parameter(torch.ones(2 * layers + 1, hidden))
        self.qkv = matrices(heads + 2 * shape.kv_size, hidden, 0.5)
        self.o = matrices(hidden, heads, quiet)
        self.gate_up = matrices(2 * inner, hidden, 0.5)
        self.down = matrices(hidden, inner, quiet)
        position = torch.arange(shape.max_position_embeddings).float()
        steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        angles = torch.outer(position, shape.rope_theta**-steps)
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def attend(self, x: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        shape, (batch, length, _) = self.shape, x.shape
        cos, sin = self.cos[:length], self.sin[:length]
        q, k, v = F.linear(x, qkv).split([shape.q_size, shape.kv_size, shape.kv_size], dim=-1)
        q, k, v = (t.view(batch, length, -1, shape.head_dim) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        share = shape.num_attention_heads // shape.num_key_value_heads
        k, v = (t.repeat_interleave(share, dim=2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), o)

    def forward(
        self, tokens: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weighted mean loss, and the plain mean over the definitions alone."""
        eps, dtype = self.shape.rms_norm_eps, self.dtype
        embed = self.embed.to(dtype)
        stacks = (self.qkv, self.o, self.gate_up, self.down)
        x = F.embedding(tokens[:, :-1], embed)
        for i, layer in enumerate(zip(*(s.to(dtype).unbind(0) for s in stacks), strict=True)):
            qkv, o, gate_up, down = layer
            x = x + self.attend(rms_norm(x, self.norms[2 * i], eps), qkv, o)
            gate, up = F.linear(rms_norm(x, self.norms[2 * i + 1], eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        logits = F.linear(rms_norm(x, self.norms[-1], eps), embed).float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        full = (weights == 1).float()
        mean = (losses * weights).sum() / weights.sum()
        return mean, (losses.detach() * full).sum() / full.sum()
