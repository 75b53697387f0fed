"""Compile the CPU's native code before a server needs it.

    python -m scripts.compile_native sym_int8

run_demo.sh does so while pip installs what only the server needs: torch and DeepSpeed are enough
here. What cannot be compiled is said again, and done without, when the server starts.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from autotp_serving.distributed.collectives import open_shared_memory_op, quiet_deepspeed
from autotp_serving.kernels.cpu.attention import load_library as load_attention
from autotp_serving.kernels.cpu.layer_ops import load_layer_ops
from autotp_serving.kernels.cpu.linear import load_library as load_linear
from autotp_serving.logs import configure_logging
from autotp_serving.low_bit.formats import FORMATS


def main(format_name: str) -> None:
    """Compile the attention, the layers' operations, one format's products and the all-reduce."""
    configure_logging()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    def compile_ours() -> None:
        load_attention()
        load_layer_ops()
        load_linear(FORMATS[format_name])

    with ThreadPoolExecutor(1) as others, quiet_deepspeed():
        ours = others.submit(compile_ours)
        open_shared_memory_op()
        ours.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
