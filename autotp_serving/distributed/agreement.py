"""Do all hosts serve the same model with the same settings? Every rank, at start.

Each host may keep the model, and a file of settings, at a place of its own. What shapes the work
must still be the same everywhere: else the ranks would wait for each other for ever, or add up
nonsense.
"""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.launch import RankGroup

SHARED_SETTINGS = (
    "low_bit", "low_bit_provider", "lm_head_low_bit", "modules_to_not_convert", "load_format",
    "dtype", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size",
    "kv_cache_dtype", "step_timeout", "task", "expert_parallel",
)  # fmt: skip

SAMPLE_BYTES = 4096


def check_agreement(config: ServingConfig, group: RankGroup) -> None:
    """Compare this rank's settings and model with the others'.

    Raises:
        ConfigError: on every rank alike; naming the setting, and the host if there are several.
    """
    own: dict[str, Any] = {name: getattr(config, name) for name in SHARED_SETTINGS}
    own["kv_offload_dir"] = config.kv_offload_dir and "a folder"  # of its own on each host
    own["draft_model"] = config.draft_model and "a folder"
    several_hosts = group.local_size < group.size
    model = fingerprint(Path(config.model_path)) if several_hosts else ""
    ranks = group.all_gather((socket.gethostname(), config.model_path, model, own))
    first_host, first_path, first_model, first = ranks[0]
    for rank, (host, path, model, settings) in enumerate(ranks):
        name = f"rank {rank} on host {host}" if several_hosts else f"rank {rank}"
        for setting, value in settings.items():
            if value != first[setting]:
                raise ConfigError(
                    f"--{setting.replace('_', '-')} is {_show(first[setting])} on rank 0 and "
                    f"{_show(value)} on {name}: give all ranks the same"
                )
        if model != first_model:
            raise ConfigError(
                f"'{path}' on host {host} does not hold the files of '{first_path}' on host "
                f"{first_host}: copy the same model to all hosts"
            )


def fingerprint(folder: Path) -> str:
    """Tell checkpoints apart without reading them: their config, and a little of each file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode())
        with path.open("rb") as file:
            for offset in (0, num_bytes // 2, max(0, num_bytes - SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "empty"
    return "not set" if value is None else str(value)
