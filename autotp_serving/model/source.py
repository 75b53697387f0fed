"""From what the command line calls the model, a path or a hub's name, to a folder. All ranks.

One rank of each host fetches and converts; the others wait for it. Before torch is imported: a
download may take an hour, and what cannot be had is refused at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from autotp_serving.config import DEFAULT_LOW_BIT, ConfigError, ServingConfig
from autotp_serving.distributed.launch import RankGroup, TorchRankGroup
from autotp_serving.model.gguf.folder import (
    cache_folder,
    convert_metadata,
    describe_types,
    find_gguf,
    read_headers,
)
from autotp_serving.model.hub import download
from autotp_serving.model.hub.names import parse_hub_name
from autotp_serving.pooling import find_task

logger = logging.getLogger(__name__)


def resolve_model(config: ServingConfig, group: RankGroup) -> ServingConfig:
    """Have the model in a folder of this host; all ranks must call it.

    Returns:
        The settings with `model_path` that folder, the model's name as it was given, and a task.

    Raises:
        ConfigError: it cannot be had; in one line, with the cure.
        LaunchError: its download has stalled.
    """
    folder = _do_once_per_host(config.model_path, group, lambda: find_folder(config))
    if config.task == "auto":
        config = replace(config, task=find_task(Path(folder)))
    if folder == config.model_path:
        return config
    # A GGUF file given by its path goes by its own name, as a folder does.
    is_path = os.path.exists(config.model_path)
    name = Path(config.model_path).resolve().name if is_path else config.model_path
    names = config.served_model_name or (name.removesuffix(".gguf"),)
    return replace(config, model_path=folder, served_model_name=names)


def find_folder(config: ServingConfig) -> str:
    """This host's folder with the model, fetched and converted if need be; `model_path` if that is
    one already, or leads nowhere."""
    path = Path(config.model_path)
    name = None if os.path.lexists(path) else parse_hub_name(config.model_path)
    if name is not None:
        path = download(
            name,
            config.hub,
            config.revision,
            needs_weights=not config.plan and config.load_format != "dummy",
            with_code=config.trust_remote_code,
        )
    elif config.revision is not None or config.hub != "huggingface":
        flag = "--hub" if config.revision is None else "--revision"
        raise ConfigError(
            f"{flag} is for a model that is given by its name on a hub, as organisation/name, and "
            f"'{config.model_path}' is a path: leave it out"
        )
    files = find_gguf(path)
    if files:
        folder = convert_metadata(files)
        logger.info(
            "%s holds its weights as %s: they are decoded, and served as %s",
            files[0].name,
            describe_types(read_headers(files)),
            config.low_bit or DEFAULT_LOW_BIT,
        )
        return str(folder)
    return config.model_path if name is None else str(path)


def _do_once_per_host(what: str, group: RankGroup, find: Callable[[], str]) -> str:
    """Call `find` on the first rank of each host, and give its result to the others there."""
    if isinstance(group, TorchRankGroup):  # which exchanges nothing before torch is there
        with _hold_lock(what):  # the first to come does the work, the others find it done
            return find()
    host = socket.gethostname()
    found = find() if group.local_rank == 0 else None
    if group.size == 1:
        assert found is not None, "the only rank is the first"
        return found
    return next(
        folder for there, folder in group.all_gather((host, found)) if there == host and folder
    )


@contextlib.contextmanager
def _hold_lock(what: str) -> Iterator[None]:
    """Keep the other ranks of this host waiting; the lock goes with its process."""
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    folder = cache_folder().with_name("locks")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
