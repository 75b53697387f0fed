"""ipex-llm as the one that converts and multiplies, where it is installed. Every rank.

The only file that imports ipex-llm, and only when asked. It needs an environment of its own, see
requirements/ipex-llm.txt; ours is the other provider and needs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.low_bit.formats import BLOCK, LowBitError

# ipex-llm 2.2.0 refuses nf3, nf4, fp4 and fp8 on CPU in its first forward pass, and its fp6 ends
# the process there (GGML_ASSERT), so that everything else is refused here before loading.
CPU_FORMATS = ("sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "woq_int4")

FORMATS_ON = {"cpu": CPU_FORMATS, "xpu": None}  # None: it says itself what it cannot do


def check_ipex_llm(low_bit: str, device: torch.device) -> None:
    """Raise LowBitError, with the cure, when ipex-llm cannot serve `low_bit` on `device`."""
    if device.type not in FORMATS_ON:
        raise LowBitError(f"ipex-llm runs on cpu and xpu, not on {device.type}: use native")
    formats = FORMATS_ON[device.type]
    if formats is not None and low_bit not in formats:
        raise LowBitError(
            f"ipex-llm has no '{low_bit}' on CPU, only {', '.join(CPU_FORMATS)}: use native"
        )
    _import_optimize_model()


def convert_linear(module: nn.Module, weight: Tensor, low_bit: str, model_config: Any) -> nn.Module:
    """Have ipex-llm make the layer that takes the place of `module`.

    `module` is a torch `Linear` or AutoTP's `LinearLayer` or `LinearAllreduce`; of the last,
    ipex-llm keeps the process group and all-reduces over it by DeepSpeed, in float32. `weight` is
    this rank's slice `[rows, cols]`; the bias is carried over as it is, filled or not yet. Raises
    LowBitError when `cols` is no multiple of 64: ipex-llm would leave such a layer unconverted.
    """
    if weight.shape[1] % BLOCK:
        raise LowBitError(
            f"ipex-llm needs a multiple of {BLOCK} columns per rank, not {weight.shape[1]}: use "
            "another number of ranks or native"
        )
    optimize_model = _import_optimize_model()
    bias = module.bias
    if bias is not None:
        # ipex-llm copies the bias, which may still be on the meta device.
        module.bias = nn.Parameter(weight.new_zeros(weight.shape[0], device="cpu"), False)
    module.weight = nn.Parameter(weight.cpu(), False)
    # It replaces the children of a model and looks up the model's type for its scale search.
    holder = nn.Module()
    holder.linear, holder.config = module, model_config
    optimize_model(holder.eval(), low_bit, optimize_llm=False, torch_dtype=weight.dtype)
    if holder.linear is module:
        raise LowBitError(f"ipex-llm does not convert a {type(module).__name__}: use native")
    converted = holder.linear.to(weight.device)
    # Any layer with as many outputs as the vocabulary has words is taken for the head and would
    # compute the last position only, which is wrong in a batch of several sequences.
    converted.optimize_lm_head = False
    converted.bias = bias
    return converted


def _import_optimize_model() -> Callable[..., Any]:
    """Import ipex-llm, and put back the root logger that it sets up for itself."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        from ipex_llm import optimize_model
    except ModuleNotFoundError as error:
        if error.name != "ipex_llm":
            raise LowBitError(f"ipex-llm lacks {error.name}: {_CURE}") from error
        raise LowBitError(f"ipex-llm is not installed: {_CURE}") from error
    except Exception as error:  # its import reaches deep into transformers and breaks in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LowBitError(f"ipex-llm cannot be imported ({reason}): {_CURE}") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    logging.getLogger("ipex_llm").setLevel(logging.WARNING)
    return optimize_model


_CURE = "use the environment of requirements/ipex-llm.txt, or native"
