"""DeepSpeed's collectives for the model: shared memory on CPU, NCCL on CUDA, xccl on XPU.

Every rank. The all-reduces that cross ranks inside a forward pass go through `join_collectives`'s
result, but for those that a CUDA kernel takes together with the norm after them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autotp_serving.collector import without_collector
from autotp_serving.devices.build import (
    BuildError,
    cache_folder,
    find_reason,
    hold_build_lock,
    remember_failure,
)
from autotp_serving.distributed import listeners
from autotp_serving.distributed.launch import GROUP_TIMEOUT, RankGroup, TorchRankGroup
from autotp_serving.distributed.store import has_store, prepare_store
from autotp_serving.step_times import StepTimes

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")

logger = logging.getLogger(__name__)

ANY_TYPE_LEVEL = 2
"""DeepSpeed's name for a processor whose shared-memory all-reduce takes every float type."""

SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES_PER_RANK = 72 * 2**20
"""What DeepSpeed's all-reduce takes of it, rounded up."""


def join_collectives(
    group: RankGroup, device_kind: str, backend: str, times: StepTimes, *, is_host: bool
) -> Callable[[Any], Any]:
    """Start DeepSpeed's collectives for the model, on every rank.

    DeepSpeed reads the group from the environment; `LOCAL_SIZE` must be right before its
    shared-memory all-reduce starts, or that crashes. Each all-reduce is counted in `times`, but for
    those inside ipex-llm's layers, which call DeepSpeed by themselves.

    Args:
        is_host: the device is the host, whose memory ranks may share.

    Returns:
        A function that all-reduces a tensor over the ranks, in place, and returns it.
    """
    if group.size == 1:
        return lambda tensor: tensor
    on_one_host, has_nccl = group.local_size == group.size, backend == "nccl"
    if on_one_host:
        listeners.keep_to_loopback(os.environ)
    import torch
    import torch.distributed

    # A program that makes a second LLM has joined for the first.
    has_joined = torch.distributed.is_initialized()
    init_method = None if has_joined or has_store(os.environ) else prepare_store(group)
    os.environ.update(
        RANK=str(group.rank),
        WORLD_SIZE=str(group.size),
        LOCAL_RANK=str(group.local_rank),
        LOCAL_SIZE=str(group.local_size),
        DS_ACCELERATOR=device_kind,
    )
    with quiet_deepspeed():
        with without_collector():
            import deepspeed
            import deepspeed.comm

        if is_host:
            _load_shared_memory_op(group)
        deepspeed.init_distributed(
            dist_backend=backend,
            timeout=GROUP_TIMEOUT,
            init_method=init_method,
            rank=group.rank,
            world_size=group.size,
            verbose=False,
        )
    if is_host:
        _unlink_shared_memory(group)
    backend = deepspeed.comm.comm.cdb
    if is_host and getattr(backend, "shm_vector_kernel_level", 0) >= ANY_TYPE_LEVEL:
        return _all_reduce_in_shared_memory(times)
    symmetric = None
    if on_one_host and has_nccl:
        from autotp_serving.distributed.symmetric_memory import SymmetricAllReduce

        make = functools.partial(SymmetricAllReduce, dtype=torch.bfloat16)
        symmetric = open_between_cards(group, make, "small sums take NCCL")

    def all_reduce(tensor: Any) -> Any:
        started = time.perf_counter()
        if symmetric is not None and symmetric.takes(tensor):
            symmetric(tensor)
        else:
            deepspeed.comm.inference_all_reduce(tensor)
        times.add_collective(tensor.nbytes, time.perf_counter() - started)
        return tensor

    return all_reduce


def join_for_exchange(group: RankGroup) -> None:
    """Let ranks that run no model exchange values; ranks of MPI can from the start."""
    if not isinstance(group, TorchRankGroup):
        return
    if group.local_size == group.size:
        listeners.keep_to_loopback(os.environ)
    import torch.distributed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo",
            init_method=None if has_store(os.environ) else prepare_store(group),
            rank=group.rank,
            world_size=group.size,
            timeout=GROUP_TIMEOUT,
        )


def broadcast_tokens(token_ids: Any) -> None:
    """Give every rank, in place, what rank 0 has in a tensor; once `join_collectives` is done."""
    import torch.distributed

    torch.distributed.broadcast(token_ids, src=0)


def open_between_cards(
    group: RankGroup, make: Callable[[ProcessGroup, torch.device], T], without: str
) -> T | None:
    """What ranks of one host make of their cards' memory together, if all reach each other's.

    Args:
        without: what becomes of it else, for the log.
    """
    import torch
    import torch.distributed

    made = reason = None
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        made = make(torch.distributed.group.WORLD, device)
    except (RuntimeError, ImportError, AttributeError) as error:  # it is young in torch
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    reason = next(filter(None, group.all_gather(reason)), None)
    if reason is None:
        return made
    if group.rank == 0:
        logger.warning("The cards' memory cannot be shared (%s): %s", reason, without)
    return None


def _all_reduce_in_shared_memory(times: StepTimes) -> Callable[[Any], Any]:
    """DeepSpeed's shared-memory all-reduce itself: the way to it through DeepSpeed's modules
    takes about as long as a small one.
    """
    import torch

    operation = torch.ops.deepspeed.inference_all_reduce_.default

    def all_reduce(tensor: Any) -> Any:
        started = time.perf_counter()
        operation(tensor)
        times.add_collective(tensor.nbytes, time.perf_counter() - started)
        return tensor

    return all_reduce


def _unlink_shared_memory(group: RankGroup) -> None:
    """Take the names of DeepSpeed's shared memory away once every rank has mapped it.

    DeepSpeed leaves them, 69 MB of host memory a rank for every start there ever was. Without a
    name the memory goes with the last process that maps it, however that ends.
    """
    group.all_gather("mapped")
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{group.rank}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def _check_shared_memory(group: RankGroup) -> str | None:
    """What keeps DeepSpeed's buffers from fitting, if anything: to write past the end is fatal."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    needed = group.local_size * SHARED_BYTES_PER_RANK
    if free >= needed:
        return None
    return (
        f"{SHARED_MEMORY} has {free >> 20} MiB free, {needed >> 20} MiB are needed: give a "
        "container --shm-size"
    )


def _load_shared_memory_op(group: RankGroup) -> None:
    """Have DeepSpeed's shared-memory all-reduce on every rank, or do without it on all."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    several_hosts = group.local_size < group.size
    problem = None if several_hosts else _check_shared_memory(group) or open_shared_memory_op()
    if not isinstance(group, TorchRankGroup):
        problem = next(filter(None, group.all_gather(problem)), None)
    if several_hosts or problem:
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    if several_hosts and group.rank == 0:
        logger.info("Ranks on several hosts: all-reduces go through Gloo, over the network")
    if problem and group.rank == 0:
        logger.warning(
            "DeepSpeed's shared-memory all-reduce cannot be used (%s): using Gloo, about a "
            "hundred times slower per call. It needs g++, ninja and room in shared memory.",
            problem,
        )


def open_shared_memory_op() -> str | None:
    """Load DeepSpeed's shared-memory all-reduce, compiled once per environment.

    Once compiled it is loaded as it is. DeepSpeed itself would ask ninja at every start, which
    compiles again, for a minute, whenever anything in the environment looks different to it.

    Returns:
        What is in the way, if anything.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory, _import_module_from_library

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder()))
    name = ShareMemCommBuilder.NAME
    folder = Path(_get_build_directory(name, verbose=False))
    complete = folder / f"complete-{deepspeed.__version__}"
    with hold_build_lock(folder):
        try:
            if complete.exists():
                module = _import_module_from_library(name, str(folder), True)
                ShareMemCommBuilder._loaded_ops[name] = module
            else:
                _compile_shared_memory_op(folder)
                complete.touch()
        except BuildError as error:
            return str(error)
        except Exception as error:  # loading fails in many ways; Gloo serves without
            return f"{type(error).__name__}: {find_reason(str(error))}"
    return None


def _compile_shared_memory_op(folder: Path) -> None:
    """Compile it through DeepSpeed and torch, in torch's folder for it.

    Raises:
        BuildError: with the compiler's reason, now or at an earlier start.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:  # the environment is in use without being activated
        programs = Path(sys.executable).parent
        os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{programs}"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("ninja") is None:
        raise BuildError(f"no {'ninja' if compiler else 'C++ compiler'}")
    changed = Path(compiler).stat().st_mtime_ns
    own = cpp_extension.TORCH_LIB_PATH
    with remember_failure(folder / f"failed-{deepspeed.__version__}-{changed}"):
        logger.info("Compiling DeepSpeed's shared-memory all-reduce (once, about a minute)")
        # Torch writes this one path into a shell's command as it is, blanks and all.
        cpp_extension.TORCH_LIB_PATH = shlex.quote(own)
        try:
            ShareMemCommBuilder().load(verbose=False)
        except Exception as error:  # a compiler fails in many ways
            raise BuildError(find_reason(str(error))) from error
        finally:
            cpp_extension.TORCH_LIB_PATH = own


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
