"""Which layers of a model become low-bit, and which formats. Same on all ranks, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotp_serving.config import DEFAULT_LOW_BIT, ConfigError, ServingConfig
from autotp_serving.low_bit.formats import Format, LowBitError, find_format

MANIFEST_NAME = "autotp_low_bit.json"
"""Of the file that says what a folder of converted weights holds."""

AUTO_HEAD = "auto"
HEAD_FORMAT = "sym_int8"

# DeepSpeed AutoTP's layers are known by name: importing DeepSpeed takes seconds, and a single
# rank does without it.
COLUMN_PARALLEL = ("Linear", "LinearLayer", "fused_LinearLayer")
ROW_PARALLEL = ("LinearAllreduce",)

# A router's few weights decide alone which experts a token sees; transformers 5 has them in no
# linear layer at all.
ROUTERS = (
    *(".mlp.gate", ".block_sparse_moe.gate", ".gate.wg"),
    *(".router", ".router.proj", ".router.layer", ".router.gate"),
)

INDEXER = ".indexer."
"""In the names of what chooses the tokens that attention sees: few weights, as a router's."""


@dataclass(frozen=True)
class LowBitSelection:
    """The formats asked for.

    Attributes:
        linears: of the linear layers; None leaves them dense.
        head: of the output head; None leaves it dense.
        keep_dense: parts of module names that stay dense.
    """

    linears: Format | None
    head: Format | None
    keep_dense: tuple[str, ...] = ()

    @staticmethod
    def from_names(low_bit: str, head: str, keep_dense: tuple[str, ...]) -> LowBitSelection:
        """Look the names up; head "auto" is sym_int8 beside low-bit linears, else dense.

        The head decides each token alone, with no later layer to even its errors out.

        Raises:
            LowBitError: an unknown name.
        """
        linears = find_format(low_bit)
        if head == AUTO_HEAD:
            return LowBitSelection(
                linears, find_format(HEAD_FORMAT) if linears else None, keep_dense
            )
        return LowBitSelection(linears, find_format(head), keep_dense)

    def converts(self, name: str, module: Any) -> bool:
        """True for a linear layer that is to become low-bit."""
        return is_linear(module) and self.converts_linear(name)

    def converts_linear(self, name: str) -> bool:
        """The same for what is known to be a linear layer."""
        return (
            self.linears is not None
            and not name.endswith(ROUTERS)
            and INDEXER not in name
            and not any(part in name for part in self.keep_dense)
        )


def is_linear(module: Any) -> bool:
    """True for torch's linear layer and for those that AutoTP makes of it."""
    return type(module).__name__ in (*COLUMN_PARALLEL, *ROW_PARALLEL)


def find_low_bit_selection(
    config: ServingConfig, stored: str | None, is_quantized: bool = False
) -> LowBitSelection:
    """What is to be converted while loading; nothing of a folder that was saved converted.

    Of a checkpoint that others have quantized, what they left in 16 bits stays so, but for a head
    that is asked for by name; the rest is the checkpoint's own business.

    Args:
        stored: the format that the folder was saved in, None for an ordinary checkpoint.
        is_quantized: by others.

    Raises:
        ConfigError: an unknown format, or one that differs from the saved folder's.
    """
    try:
        selection = LowBitSelection.from_names(
            config.low_bit or stored or DEFAULT_LOW_BIT,
            "bf16" if config.pools else config.lm_head_low_bit,
            config.modules_to_not_convert,
        )
    except LowBitError as error:
        raise ConfigError(f"--low-bit: {error}") from error
    if is_quantized:
        is_asked = config.lm_head_low_bit != AUTO_HEAD
        return LowBitSelection(linears=None, head=selection.head if is_asked else None)
    if stored is None:
        return selection
    if selection.linears is None or selection.linears.name != stored:
        raise ConfigError(
            f"--low-bit {config.low_bit}: {config.model_path} was saved as {stored}; "
            "leave the flag out, or load the original checkpoint"
        )
    return LowBitSelection(linears=None, head=None)
