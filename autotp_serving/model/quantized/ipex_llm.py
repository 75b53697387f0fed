"""Folders that ipex-llm's own save_low_bit wrote: formats of this server's. Every rank.

A weight is uint8 [bytes], rows one after another, in blocks of 64 weights whose scale (and smallest
weight) stands before the codes. The codes are those of formats.py, most of them in the same order:
they are copied. What shape a weight has is not stored: config.json tells the hidden size, which is
the columns of every layer but those that lead back to it, where it is the rows.

ipex-llm merges queries, keys and values of most families into one layer; they are taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import ALIASES, BLOCK, FORMATS, Format, LowBitError
from autotp_serving.low_bit.packing import pack
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Range, Read
from autotp_serving.model.stored_tensors import StoredTensor
from autotp_serving.model_folder import read_object

ROW_NAMES = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "w2")
HEAD_NAMES = ("lm_head", "embed_out")
# Bytes of a block's parts, in their order; those of `codes` follow.
LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "sym_int4": (("scales", 2), ("codes", 32)),
    "fp4": (("scales", 2), ("codes", 32)),
    "nf4": (("scales", 2), ("codes", 32)),
    "asym_int4": (("scales", 2), ("mins", 2), ("codes", 32)),
    "sym_int5": (("scales", 2), ("high", 8), ("codes", 32)),
    "asym_int5": (("scales", 2), ("mins", 2), ("high", 8), ("codes", 32)),
    "sym_int8": (("scales", 4), ("codes", 64)),
    "fp8_e4m3": (("scales", 4), ("codes", 64)),
    "fp8_e5m2": (("unit", 4), ("codes", 64)),  # a scale that is always 1
    "nf3": (("scales", 2), ("high", 8), ("pairs", 16)),
    "fp6": (("nibbles", 32), ("pairs", 16), ("scales", 2)),
}


@dataclass(frozen=True)
class IpexLlmWeight:
    """A weight of ipex-llm's blocks; attributes as QuantizedWeight has them."""

    name: str
    shape: tuple[int, int]
    stored_format: Format

    @property
    def parts(self) -> tuple[str, ...]:
        """See QuantizedWeight."""
        return (self.name,)

    @property
    def format(self) -> Format | None:
        """See QuantizedWeight."""
        return self.stored_format

    @property
    def fallback(self) -> Format:
        """See QuantizedWeight."""
        return self.stored_format

    def repack(self, read: Read, rows: Range, cols: Range) -> LowBitTensor:
        """See QuantizedWeight."""
        layout = LAYOUTS[self.stored_format.name]
        block_bytes = sum(size for _, size in layout)
        num_blocks = self.shape[1] // BLOCK
        row_bytes = num_blocks * block_bytes
        data = read(self.name, ((rows[0] * row_bytes, rows[1] * row_bytes),))
        blocks = data.view(-1, num_blocks, block_bytes)[:, cols[0] // BLOCK : cols[1] // BLOCK]
        found, start = {}, 0
        for part, size in layout:
            found[part] = blocks[:, :, start : start + size].reshape(-1, size)
            start += size
        planes = {}
        for plane in self.stored_format.planes:
            made = self._make_plane(plane.name, found)
            made = made.view(getattr(torch, plane.dtype)).reshape(blocks.shape[0], -1)
            if made.is_floating_point() and not made.isfinite().all():
                raise LowBitError(f"{self.name} has scales that are no numbers")
            planes[plane.name] = made
        return LowBitTensor(self.stored_format, (rows[1] - rows[0], cols[1] - cols[0]), planes)

    def decode(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See QuantizedWeight."""
        return dequantize(self.repack(read, rows, cols))

    def _make_plane(self, plane: str, found: dict[str, Tensor]) -> Tensor:
        """A plane's bytes [blocks, bytes of a block] out of the parts of ipex-llm's blocks."""
        name = self.stored_format.name
        if plane in ("scales", "mins"):
            return found[plane].contiguous()
        if name == "fp8_e5m2" and not (found["unit"].contiguous().view(torch.float32) == 1).all():
            raise LowBitError(f"{self.name} has blocks with a scale, which fp8 has not")
        if name == "nf4":
            return found["codes"] >> 4 | found["codes"] << 4
        if name in ("nf3", "fp6"):
            codes = _read_nf3(found) if name == "nf3" else _read_fp6(found)
            return pack(codes, self.stored_format.code_bits)[plane]
        return found[plane]


def _read_nf3(found: dict[str, Tensor]) -> Tensor:
    """Codes [blocks, 64]: pairs of low bits from the top of each byte, and the third bits apart."""
    pairs = torch.stack([found["pairs"] >> shift & 3 for shift in (6, 4, 2, 0)], 2).flatten(1)
    high = torch.stack([found["high"] >> shift & 1 for shift in range(8)], 2).flatten(1)
    return pairs | high << 2


def _read_fp6(found: dict[str, Tensor]) -> Tensor:
    """Codes [blocks, 64]: nibbles and pairs of high bits in groups of 16, columns shuffled."""
    codes = torch.empty(len(found["nibbles"]), BLOCK, dtype=torch.uint8)
    for position in range(BLOCK):
        group, rest = divmod(position, 16)
        line, column = divmod(rest, 4)
        column = (1, 3, 0, 2)[column]
        nibble = found["nibbles"][:, group * 8 + line // 2 * 4 + column]
        pair = found["pairs"][:, group * 4 + column]
        codes[:, position] = (nibble >> (4, 0)[line % 2] & 15) | (
            pair >> (6, 4, 2, 0)[line] & 3
        ) << 4
    return codes


def find_ipex_llm_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """All weights in blocks.

    Raises:
        ConfigError: a format or sizes that are not read here.
    """
    name = quantization.settings.get("low_bit")
    format = FORMATS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if format is None:
        raise quantization.refuse(
            f"ipex-llm's {name!r:.40} is not read here (read are {', '.join(LAYOUTS)})"
        )
    config = read_object(quantization.source.parent / "config.json")
    hidden = config.get("hidden_size")
    if type(hidden) is not int or hidden < BLOCK or hidden % BLOCK:
        raise quantization.refuse(f"hidden_size {hidden!r:.20} tells no shape of its weights")
    found: dict[str, QuantizedWeight] = {}
    for one, tensor in stored.items():
        if one.endswith(".weight") and tensor.dtype == "U8" and len(tensor.shape) == 1:
            found[one] = _make(quantization, one, tensor.shape[0], format, hidden, config)
    return found


def _make(
    quantization: Quantization,
    name: str,
    num_bytes: int,
    format: Format,
    hidden: int,
    config: dict[str, Any],
) -> IpexLlmWeight:
    layer = name.removesuffix(".weight").rpartition(".")[2]
    formats = [format]
    if layer in HEAD_NAMES and type(config.get("vocab_size")) is int:
        # The head may have more bits than the rest: its rows are known, and tell which.
        wanted = config["vocab_size"] * (hidden // BLOCK)
        others = (one for one in FORMATS.values() if one is not format)
        formats = [one for one in (format, *others) if _block_bytes(one) * wanted == num_bytes]
    for one in formats:
        blocks, rest = divmod(num_bytes, _block_bytes(one))
        other, rest_of_rows = divmod(blocks * BLOCK, hidden)
        if not rest and not rest_of_rows and other:
            shape = (hidden, other) if layer in ROW_NAMES else (other, hidden)
            if shape[1] % BLOCK == 0:
                return IpexLlmWeight(name, shape, one)
    raise quantization.refuse(
        f"{name} has {num_bytes} bytes, no weight of hidden_size {hidden} in {format.name}"
    )


def _block_bytes(format: Format) -> int:
    return sum(size for _, size in LAYOUTS[format.name])


def find_merged_parts(
    quantization: Quantization, stored: dict[str, StoredTensor]
) -> dict[str, tuple[str, int, int]]:
    """The rows of queries, keys and values in layers that ipex-llm has merged.

    Returns:
        Name of the part: name of the whole, first row and the row after the last.
    """
    config = read_object(quantization.source.parent / "config.json")
    if config.get("model_type") == "phi3":  # whose own layers are merged
        return {}
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads", heads)
    if type(heads) is not int or type(kv_heads) is not int or heads < 1:
        return {}
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    sizes = {
        "q_proj": heads * head_dim,
        "k_proj": kv_heads * head_dim,
        "v_proj": kv_heads * head_dim,
    }
    found = {}
    for name in stored:
        parent, _, attribute = name.rpartition(".")
        if attribute not in ("weight", "bias") or not parent.endswith(".qkv_proj"):
            continue
        start = 0
        for part, size in sizes.items():
            target = f"{parent.removesuffix('qkv_proj')}{part}.{attribute}"
            found[target] = (name, start, start + size)
            start += size
    return found
