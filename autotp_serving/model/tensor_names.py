"""From the names of a model's tensors to those in its checkpoint. Every rank.

The checkpoint keeps the names of its day, while the model has those of the installed transformers,
in which some layers were renamed and our own parts (`unfuse.py`) take the place of others.
"""

from __future__ import annotations

import re

from torch import nn

from autotp_serving.layers.unfuse import FusedOutput
from autotp_serving.model.checkpoint import Checkpoint

# Model's name, checkpoint's name; tried in this order for a tensor that the checkpoint lacks. The
# last three are those inside a vision-language model.
RENAMED = (
    (r"^lm_head\.", "embed_out."),
    (r"^embed_out\.", "lm_head."),
    (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"^model\.", "language_model.model."),
    (r"^model\.", "model.language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def match_tensor_names(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the checkpoint's tensors the names of the model's.

    Args:
        model: on the meta device.
    """
    known = checkpoint.names()
    for name in model.state_dict(keep_vars=True):
        if name in known:
            continue
        for pattern, replacement in RENAMED:
            source = re.sub(pattern, replacement, name)
            if source != name and source in known:
                checkpoint.add_view(name, source, 0, checkpoint.shape(source)[0])
                break
    for fused_name, module in model.named_modules():
        if isinstance(module, FusedOutput):
            _match_parts(fused_name, module.sizes, checkpoint)


def _match_parts(fused_name: str, sizes: dict[str, int], checkpoint: Checkpoint) -> None:
    """Let each part of a fused layer be some rows of the checkpoint's tensor."""
    parent = fused_name.rpartition(".")[0]
    for attribute in ("weight", "bias"):
        source = f"{fused_name}.{attribute}"
        if source not in checkpoint.names():
            continue
        start = 0
        for part, size in sizes.items():
            checkpoint.add_view(f"{parent}.{part}.{attribute}", source, start, start + size)
            start += size
