"""DeepSpeed's collectives for the model: shared memory on CPU, NCCL on CUDA, xccl on XPU.

Every rank. The only sums that cross ranks inside a forward pass go through `join_collectives`'s
result.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotp_serving.native_build import cache_folder, hold_build_lock
from autotp_serving.ranks import GROUP_TIMEOUT, Control, TorchControl, own_host
from autotp_serving.step_times import StepTimes

logger = logging.getLogger(__name__)


def join_collectives(
    control: Control, device_kind: str, backend: str, times: StepTimes
) -> Callable[[Any], Any]:
    """Start DeepSpeed's collectives for the model, on every rank.

    DeepSpeed reads the group from the environment; `LOCAL_SIZE` must be right before its
    shared-memory all-reduce starts, or that crashes. Each sum is counted in `times`.

    Returns:
        A function that sums a tensor over the ranks, in place, and returns it.
    """
    if control.size == 1:
        return lambda tensor: tensor
    if not isinstance(control, TorchControl):
        address, port = control.all_gather(_free_address(control))[0]
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
    os.environ.update(
        RANK=str(control.rank),
        WORLD_SIZE=str(control.size),
        LOCAL_RANK=str(control.local_rank),
        LOCAL_SIZE=str(control.local_size),
        DS_ACCELERATOR=device_kind,
    )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder()))
    with quiet_deepspeed():
        import deepspeed
        import deepspeed.comm

        if device_kind == "cpu":
            _build_shared_memory_op(control)
        deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False)
    _count_sums(deepspeed.comm.comm.cdb, times)

    def all_reduce(tensor: Any) -> Any:
        deepspeed.comm.inference_all_reduce(tensor)
        return tensor

    return all_reduce


def _count_sums(backend: Any, times: StepTimes) -> None:
    """Have DeepSpeed's backend count its all-reduces: those of AutoTP's own layers pass by us."""
    all_reduce = backend.inference_all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = all_reduce(tensor, *args, **kwargs)
        times.add_collective(tensor.nbytes, time.perf_counter() - started)
        return result

    backend.inference_all_reduce = counted


def _build_shared_memory_op(control: Control) -> None:
    """Compile DeepSpeed's shared-memory all-reduce, once per machine, or do without it.

    One rank per host compiles, under a lock.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    def build() -> str | None:
        folder = Path(_get_build_directory(ShareMemCommBuilder.NAME, verbose=False))
        with hold_build_lock(folder):
            if not list(folder.glob("*.so")):
                logger.info("Compiling DeepSpeed's shared-memory all-reduce (once, about a minute)")
            try:
                ShareMemCommBuilder().load(verbose=False)
            except Exception as error:  # a compiler fails in many ways; Gloo serves without one
                return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None

    several_hosts = control.local_size < control.size
    problem = build() if control.local_rank == 0 and not several_hosts else None
    if isinstance(control, TorchControl):
        return
    problems = [found for found in control.all_gather(problem) if found]
    if several_hosts or problems:
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    if problems and control.rank == 0:
        logger.warning(
            "DeepSpeed's shared-memory all-reduce cannot be compiled (%s): using Gloo, about a "
            "hundred times slower per call. Install g++ and ninja.",
            problems[0],
        )


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Turn DeepSpeed's prints into debug lines, and keep only warnings of its log."""
    logging.getLogger("DeepSpeed").addFilter(_is_warning)
    with contextlib.redirect_stdout(io.StringIO()) as chatter:
        yield
    for line in chatter.getvalue().splitlines():
        logger.debug("deepspeed: %s", line)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _free_address(control: Control) -> tuple[str, str]:
    """A free port of this host, for rank 0's rendezvous."""
    host = own_host(control)
    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, str(probe.getsockname()[1])
