"""DeepSpeed's collectives for the model: shared memory on CPU, NCCL on CUDA, xccl on XPU.

Every rank. The only sums that cross ranks inside a forward pass go through `join_collectives`'s
result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotp_serving.ranks import GROUP_TIMEOUT, Control, TorchControl, own_host

logger = logging.getLogger(__name__)


def join_collectives(control: Control, device_kind: str, backend: str) -> Callable[[Any], Any]:
    """Start DeepSpeed's collectives for the model, on every rank.

    DeepSpeed reads the group from the environment; `LOCAL_SIZE` must be right before its
    shared-memory all-reduce starts, or that crashes.

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
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_build_folder()))
    with quiet_deepspeed():
        import deepspeed
        import deepspeed.comm

        if device_kind == "cpu":
            _build_shared_memory_op(control)
        deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False)

    def all_reduce(tensor: Any) -> Any:
        deepspeed.comm.inference_all_reduce(tensor)
        return tensor

    return all_reduce


def _build_folder() -> Path:
    """Where extensions are compiled: one folder per environment.

    The compiler's command names the environment's paths, so two environments that shared a
    folder would recompile at every start.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    environment = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    return cache / "autotp_serving" / environment


def _build_shared_memory_op(control: Control) -> None:
    """Compile DeepSpeed's shared-memory all-reduce, once per machine, or do without it.

    One rank per host compiles while it holds a lock that the operating system frees if the rank
    dies. Torch's own lock is a file that a killed build leaves behind, and on which every later
    start would wait for ever; under our lock such a file can only be a leftover.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    def build() -> str | None:
        folder = Path(_get_build_directory(ShareMemCommBuilder.NAME, verbose=False))
        with (folder.parent / f"{ShareMemCommBuilder.NAME}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
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
