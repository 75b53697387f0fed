"""Muon for the matrices and AdamW for the rest, as one function that torch.compile can fuse.

Muon replaces a matrix's momentum by its nearest (semi-)orthogonal matrix, so that rare facts move
the weights as far as frequent ones. That is what lets a small model learn a dictionary by heart.
Newton-Schulz iteration and its coefficients: Keller Jordan, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import torch
from model import Llama, Shape

MATRICES = ("qkv", "o", "gate_up", "down")
VECTORS = ("embed", "norms")


def orthogonalize(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration on a stack of matrices, each scaled for its shape."""
    rows, columns = stack.shape[-2:]
    x = stack.bfloat16()
    if rows > columns:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    if rows > columns:
        x = x.mT
    return x.float() * max(1.0, rows / columns) ** 0.5


class Optimizer:
    """Holds the momenta; `update` consumes one flat gradient."""

    def __init__(self, model: Llama, decay: float, compile_it: bool) -> None:
        self.shape: Shape = model.shape
        self.params = {name: getattr(model, name) for name in (*MATRICES, *VECTORS)}
        self.first = {name: torch.zeros_like(p.data) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(self.params[name].data) for name in VECTORS}
        self.decay = decay
        self.pack = torch.compile(self._pack) if compile_it else self._pack
        self.update = torch.compile(self._update) if compile_it else self._update

    def parts(self, name: str, stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The separate matrices that a stacked tensor holds."""
        if name == "qkv":
            return stack.split([self.shape.q_size, self.shape.kv_size, self.shape.kv_size], dim=1)
        return stack.chunk(2, dim=1) if name == "gate_up" else (stack,)

    def _pack(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All gradients as one bfloat16 vector, to cross GPUs in one all-reduce."""
        return torch.cat([gradient.bfloat16().flatten() for gradient in gradients])

    @torch.no_grad()
    def _update(
        self,
        flat: torch.Tensor,
        matrix_rate: torch.Tensor,
        vector_rate: torch.Tensor,
        correction: torch.Tensor,
    ) -> None:
        """One step. `correction` is AdamW's 1 - beta2 ** step; rates are tensors so as not to
        compile anew whenever they change."""
        sizes = [p.numel() for p in self.params.values()]
        for (name, p), piece in zip(self.params.items(), flat.split(sizes), strict=True):
            grad, momentum = piece.view_as(p).float(), self.first[name]
            if name in MATRICES:
                momentum.mul_(0.95).add_(grad, alpha=0.05)
                ahead = momentum * 0.95 + grad * 0.05
                steps = torch.cat([orthogonalize(m) for m in self.parts(name, ahead)], dim=1)
                p.mul_(1 - matrix_rate * self.decay).sub_(steps * matrix_rate)
            else:
                momentum.mul_(0.9).add_(grad, alpha=0.1)
                squares = self.second[name]
                squares.mul_(0.99).add_(grad * grad, alpha=0.01)
                p.sub_(momentum / ((squares / correction).sqrt() + 1e-10) * vector_rate)
