"""ipex-llm's own layers beside ours, where it is installed; its refusals everywhere."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autotp_serving.kernels.ipex_llm import CPU_FORMATS, check_ipex_llm, convert_linear
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.formats import LowBitError, find_format
from autotp_serving.low_bit.tensor import quantize

INSTALLED = importlib.util.find_spec("ipex_llm") is not None
CPU = torch.device("cpu")
MODEL_CONFIG = SimpleNamespace(model_type="llama", vocab_size=96, _name_or_path="")

needs_ipex_llm = pytest.mark.skipif(not INSTALLED, reason="ipex-llm is not installed")


@pytest.mark.skipif(INSTALLED, reason="ipex-llm is installed")
def test_missing_package_is_named_with_the_cure() -> None:
    with pytest.raises(LowBitError, match=r"ipex-llm is not installed: .*requirements/ipex-llm"):
        check_ipex_llm("sym_int4", CPU)


@pytest.mark.parametrize("name", ["nf3", "nf4", "fp4", "fp6", "fp8_e4m3", "fp8_e5m2"])
def test_formats_without_a_cpu_kernel_are_refused(name: str) -> None:
    """fp6 would end the process."""
    with pytest.raises(LowBitError, match=f"ipex-llm has no '{name}' on CPU, only sym_int4, "):
        check_ipex_llm(name, CPU)


def test_other_devices_are_refused() -> None:
    with pytest.raises(LowBitError, match="not on cuda"):
        check_ipex_llm("sym_int4", torch.device("cuda"))


def test_a_split_block_is_refused() -> None:
    linear = nn.Linear(100, 8)
    with pytest.raises(LowBitError, match="multiple of 64 columns per rank, not 100"):
        convert_linear(linear, linear.weight, "sym_int4", MODEL_CONFIG)


@needs_ipex_llm
def test_import_leaves_the_root_logger_alone() -> None:
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    check_ipex_llm("sym_int4", CPU)
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


@needs_ipex_llm
@pytest.mark.parametrize("name", CPU_FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_layer_agrees_with_ours_and_ours_is_no_worse(name: str, num_tokens: int) -> None:
    """ipex-llm's CPU kernels round the activations to 8 bits, ours do not."""
    torch.manual_seed(0)
    with torch.device("meta"):
        module = nn.Linear(256, 96, dtype=torch.bfloat16)
    weight, bias = torch.randn(96, 256).bfloat16(), torch.randn(96).bfloat16()
    theirs = convert_linear(module, weight, name, MODEL_CONFIG)
    assert theirs.bias.is_meta
    theirs.bias = nn.Parameter(bias, requires_grad=False)
    ours = LowBitLinear(quantize(weight, find_format(name)), bias)
    x = torch.randn(1, num_tokens, 256).bfloat16()
    exact = nn.functional.linear(x.float(), weight.float(), bias.float())
    with torch.inference_mode():
        their_out, our_out = theirs(x), ours(x)
    assert their_out.dtype == torch.bfloat16 and their_out.shape == our_out.shape
    assert (their_out - our_out).norm() < 0.012 * exact.norm()
    assert (our_out - exact).norm() < 1.05 * (their_out - exact).norm()


@needs_ipex_llm
@pytest.mark.ranks
def test_row_parallel_halves_are_reduced_by_ipex_llm() -> None:
    """Two ranks hold 128 of 256 columns each; AutoTP's layer brings its group along."""
    launcher = Path(sys.executable).parent / "mpirun"
    command = [launcher, "-np", "2", sys.executable, Path(__file__).parent / "ipex_llm_ranks.py"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2
