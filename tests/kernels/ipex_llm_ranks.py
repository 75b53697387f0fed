"""One of two ranks of test_provider_ipex_llm.py: a row-parallel layer converted by ipex-llm.

Run by `mpirun -np 2`. Prints "equal" when the all-reduce over both ranks is the whole layer's
output.
"""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import torch
from torch import nn

from autotp_serving.distributed.launch import RankGroup, join_group
from autotp_serving.kernels.ipex_llm import convert_linear
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.tensor import dequantize, quantize


def find_port(group: RankGroup) -> int:
    """A port that rank 0 found free, on both ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return group.all_gather(probe.getsockname()[1])[0]


def main() -> None:
    """Join DeepSpeed, convert this rank's half by way of AutoTP's layer, compare."""
    group = join_group(os.environ)
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(find_port(group)))
    import deepspeed
    from deepspeed.module_inject.layers import LinearAllreduce

    # Without the shared-memory all-reduce, which would first be compiled for this environment.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 256), torch.randn(96), torch.randn(3, 256)
    half = slice(group.rank * 128, group.rank * 128 + 128)
    module = LinearAllreduce(nn.Linear(256, 96), torch.distributed.group.WORLD)
    model_config = SimpleNamespace(model_type="llama")
    layer = convert_linear(module, weight[:, half], "sym_int8", model_config)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    with torch.inference_mode():
        out = layer(x[:, half])
    whole = x @ dequantize(quantize(weight, FORMATS["sym_int8"])).T + bias
    assert (out - whole).norm() < 0.01 * whole.norm(), (out - whole).norm() / whole.norm()
    print("equal", flush=True)


if __name__ == "__main__":
    main()
