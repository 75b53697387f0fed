"""DeepSpeed's collectives for the model: shared memory on CPU, NCCL on CUDA, xccl on XPU.

Every rank. The only all-reduces that cross ranks inside a forward pass go through
`join_collectives`'s result.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from autotp_serving.devices.build import cache_folder, hold_build_lock
from autotp_serving.distributed import listeners
from autotp_serving.distributed.launch import (
    GROUP_TIMEOUT,
    LaunchError,
    RankGroup,
    TorchRankGroup,
    own_host,
)
from autotp_serving.step_times import StepTimes

logger = logging.getLogger(__name__)

STORE_SCHEME = "autotp"
"""By which torch.distributed knows our way into the group."""

ANY_TYPE_LEVEL = 2
"""DeepSpeed's name for a processor whose shared-memory all-reduce takes every float type."""

SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES_PER_RANK = 72 * 2**20
"""What DeepSpeed's all-reduce takes of it, rounded up."""


def join_collectives(
    group: RankGroup, device_kind: str, backend: str, times: StepTimes
) -> Callable[[Any], Any]:
    """Start DeepSpeed's collectives for the model, on every rank.

    DeepSpeed reads the group from the environment; `LOCAL_SIZE` must be right before its
    shared-memory all-reduce starts, or that crashes. Each all-reduce is counted in `times`.

    Returns:
        A function that all-reduces a tensor over the ranks, in place, and returns it.
    """
    if group.size == 1:
        return lambda tensor: tensor
    if group.local_size == group.size:
        listeners.keep_to_loopback(os.environ)
    import torch.distributed

    # A program that makes a second LLM has joined for the first.
    has_joined = torch.distributed.is_initialized()
    init_method = None if has_joined or _has_store(os.environ) else _prepare_store(group)
    os.environ.update(
        RANK=str(group.rank),
        WORLD_SIZE=str(group.size),
        LOCAL_RANK=str(group.local_rank),
        LOCAL_SIZE=str(group.local_size),
        DS_ACCELERATOR=device_kind,
    )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder()))
    with quiet_deepspeed():
        import deepspeed
        import deepspeed.comm

        if device_kind == "cpu":
            _load_shared_memory_op(group)
        deepspeed.init_distributed(
            dist_backend=backend,
            timeout=GROUP_TIMEOUT,
            init_method=init_method,
            rank=group.rank,
            world_size=group.size,
            verbose=False,
        )
    if device_kind == "cpu":
        _unlink_shared_memory(group)
    backend = deepspeed.comm.comm.cdb
    _count_all_reduces(backend, times)
    if device_kind == "cpu" and getattr(backend, "shm_vector_kernel_level", 0) >= ANY_TYPE_LEVEL:
        return _all_reduce_in_shared_memory(times)

    def all_reduce(tensor: Any) -> Any:
        deepspeed.comm.inference_all_reduce(tensor)
        return tensor

    return all_reduce


def broadcast_tokens(token_ids: Any) -> None:
    """Give every rank, in place, what rank 0 has in a tensor; once `join_collectives` is done."""
    import torch.distributed

    torch.distributed.broadcast(token_ids, src=0)


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


def _count_all_reduces(backend: Any, times: StepTimes) -> None:
    """Have DeepSpeed's backend count its all-reduces: those of AutoTP's own layers pass by us."""
    all_reduce = backend.inference_all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = all_reduce(tensor, *args, **kwargs)
        times.add_collective(tensor.nbytes, time.perf_counter() - started)
        return result

    backend.inference_all_reduce = counted


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
    """Compile DeepSpeed's shared-memory all-reduce, once per environment, or do without it.

    Once compiled it is loaded as it is. DeepSpeed itself would ask ninja at every start, which
    compiles again, for a minute, whenever anything in the environment looks different to it.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory, _import_module_from_library

    name = ShareMemCommBuilder.NAME

    def load() -> str | None:
        folder = Path(_get_build_directory(name, verbose=False))
        complete = folder / f"complete-{deepspeed.__version__}"
        with hold_build_lock(folder):
            try:
                if complete.exists():
                    module = _import_module_from_library(name, str(folder), True)
                    ShareMemCommBuilder._loaded_ops[name] = module
                else:
                    logger.info(
                        "Compiling DeepSpeed's shared-memory all-reduce (once, about a minute)"
                    )
                    ShareMemCommBuilder().load(verbose=False)
                    complete.touch()
            except Exception as error:  # a compiler fails in many ways; Gloo serves without one
                return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None

    several_hosts = group.local_size < group.size
    problem = None if several_hosts else _check_shared_memory(group) or load()
    if not isinstance(group, TorchRankGroup):
        problem = next(filter(None, group.all_gather(problem)), None)
    if several_hosts or problem:
        deepspeed.ops.__compatible_ops__[name] = False
    if several_hosts and group.rank == 0:
        logger.info("Ranks on several hosts: all-reduces go through Gloo, over the network")
    if problem and group.rank == 0:
        logger.warning(
            "DeepSpeed's shared-memory all-reduce cannot be used (%s): using Gloo, about a "
            "hundred times slower per call. It needs g++, ninja and room in shared memory.",
            problem,
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


def _has_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun keeps the store in which the ranks find one another."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _prepare_store(group: RankGroup) -> str:
    """Have rank 0 keep that store, at an address of its own; torch's would listen on all.

    Anyone who reaches it may read and write it, so only the hosts of the group do.

    Returns:
        How torch.distributed is to be told of it.

    Raises:
        LaunchError: the address that was given to rank 0 is not to be had.
    """
    from torch.distributed import TCPStore, register_rendezvous_handler

    listener: socket.socket | None = None
    if isinstance(group, TorchRankGroup):  # started by hand, one rank after the other
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if group.rank == 0:
            try:
                listener = socket.create_server(address)
            except OSError as error:
                raise LaunchError(
                    f"rank 0 cannot listen on MASTER_ADDR {address[0]} port {address[1]} "
                    f"({error.strerror}): name an address of its host, and a free port"
                ) from error
    else:
        if group.rank == 0:
            listener = socket.create_server((own_host(group), 0))
        address = group.all_gather(listener and listener.getsockname())[0]
        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        if group.local_size < group.size:
            sources = group.all_gather(listeners.find_source(address))
            if listener is not None:
                listeners.admit_only(listener, listeners.find_sources(sources))

    def join_store(_: str, **__: Any) -> Iterator[tuple[TCPStore, int, int]]:
        store = TCPStore(
            *address,
            group.size,
            is_master=listener is not None,
            timeout=GROUP_TIMEOUT,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        yield store, group.rank, group.size

    register_rendezvous_handler(STORE_SCHEME, join_store)
    return f"{STORE_SCHEME}://"


def close_doors(group: RankGroup, device_kind: str) -> None:
    """Once every rank has joined, admit nobody to what they joined by.

    On cards, and over several hosts, only to the store: NCCL and MPI may connect again when a path
    between two ranks is first used.
    """
    if group.size == 1:
        return
    if device_kind == "cpu" and group.local_size == group.size:
        listeners.turn_everyone_away()
    elif not _has_store(os.environ) and group.rank == 0:
        listeners.turn_everyone_away(int(os.environ["MASTER_PORT"]))
