"""Products of a mixture's experts on a CUDA card, without asking the host which. Ranks on CUDA.

The weights of all experts of a layer lie one after another. Pairs of a token and one of its experts
are sorted by expert on the card, and csrc/products.cu takes a group of them at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.activations import Activations
from autotp_serving.kernels.cuda.batch_products import can_batch, launch, tile_batch
from autotp_serving.kernels.cuda.nvrtc import load_kernel
from autotp_serving.kernels.cuda.products import MOST_AT_ONCE, Tiling, load_product
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor
from autotp_serving.kernels.cuda.weights import LANES, TOKENS, find_format_name, list_arguments
from autotp_serving.low_bit.formats import num_blocks

MOST_EXPERTS = 1024
"""Threads of the one block that sorts pairs by expert."""


@dataclass(frozen=True)
class Groups:
    """Pairs of a token and one of its experts, sorted by expert.

    Attributes:
        pairs: [num_pairs] int32; pair i is of token i // experts of one token.
        table: [num_groups, 4] int32, each {expert, first of its pairs, how many, 0}.
        most: pairs of a group.
    """

    pairs: Tensor
    table: Tensor
    most: int


def group_pairs(chosen: Tensor, num_experts: int) -> Groups:
    """Sort chosen [num_tokens, experts of one token] int64, each below `num_experts`."""
    num_pairs = chosen.numel()
    most = TOKENS
    while most < MOST_AT_ONCE and num_pairs > num_experts * most:
        most *= 2
    num_groups = min(num_pairs, num_experts + num_pairs // most)
    groups = Groups(
        torch.empty(num_pairs, dtype=torch.int32, device=chosen.device),
        torch.empty(num_groups, 4, dtype=torch.int32, device=chosen.device),
        most,
    )
    load_kernel("experts.cu", "group_pairs", (), chosen.device.index)(
        (1, 1),
        MOST_EXPERTS,
        (chosen, num_pairs, most, groups.pairs, groups.table, num_groups),
    )
    return groups


def multiply_experts(
    x: Activations, weight: CudaTensor | Tensor, num_experts: int, groups: Groups
) -> Tensor:
    """Multiply each pair's activations by the weight of its expert.

    Args:
        x: of the pairs, or of their tokens, rounded as `rounding_of` says for a few.
        weight: [num_experts * rows, columns], rows in multiples of 16.

    Returns:
        [num_pairs, rows] bfloat16.
    """
    num_pairs, num_groups = len(groups.pairs), len(groups.table)
    rows, blocks = weight.shape[0] // num_experts, num_blocks(weight.shape[1])
    token_tiles, device_index = groups.most // TOKENS, x.device.index
    out = torch.empty(num_pairs, rows, dtype=torch.bfloat16, device=x.device)
    arguments = (
        *list_arguments(x, weight, out, rows),
        *(groups.table, groups.pairs, num_pairs // x.num_tokens),
    )
    if token_tiles > 2 and isinstance(weight, CudaTensor) and can_batch(device_index):
        batch_tiling = tile_batch(token_tiles, 1)
        launch(weight.format, rows, num_groups, arguments, batch_tiling, device_index, True)
        return out
    tiling = Tiling(8 if blocks >= 16 else 4, token_tiles, 1, 1)
    name = find_format_name(weight)
    load_product("multiply_few", name, tiling, device_index, is_grouped=True)(
        (-(-rows // ROWS), num_groups, 1), tiling.warps * LANES, arguments
    )
    return out
