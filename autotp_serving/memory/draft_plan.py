"""What --draft-model takes beside the model: weights and a cache of as many blocks. Every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.memory.footprint import DRAFT_KIND, Footprint, MemorySetup
from autotp_serving.model.lengths import find_length


def find_draft_footprints(setup: MemorySetup) -> list[Footprint]:
    """The draft model's footprint on each rank.

    Raises:
        ConfigError: its folder cannot be planned for.
    """
    from autotp_serving.memory.planner import find_footprints, read_planned_config

    config = setup.config.of_draft(setup.max_model_len)
    with name_draft_model(config):
        model_config, known = read_planned_config(config)
        check_draft_length(model_config, setup.max_model_len)
        return find_footprints(replace(setup, config=config), model_config, known)


@contextlib.contextmanager
def name_draft_model(config: ServingConfig) -> Iterator[None]:
    """Have what is refused meanwhile tell of --draft-model, under whose settings it was read."""
    try:
        yield
    except ConfigError as error:
        reason = str(error).removeprefix("--repo-id-or-model-path: ")
        raise ConfigError(f"--draft-model {config.model_path}: {reason}") from error


def check_draft_length(model_config: Any, max_model_len: int) -> None:
    """Refuse a draft model that takes fewer tokens than the model's sequences may have.

    Raises:
        ConfigError: with the cure.
    """
    limit = find_length(model_config).limit
    if limit < max_model_len:
        raise ConfigError(
            f"it takes {limit} tokens, and sequences may have {max_model_len}: add "
            f"--max-model-len {limit}"
        )


def add_draft(footprint: Footprint, draft: Footprint) -> Footprint:
    """Both together on one rank: the models run in turns, and load one after the other."""
    weights = dict(footprint.weights)
    for (_, name), num_bytes in draft.weights.items():
        key = DRAFT_KIND, name
        weights[key] = weights.get(key, 0) + num_bytes
    return replace(
        footprint,
        weights=weights,
        kv_bytes_per_block=footprint.kv_bytes_per_block + draft.kv_bytes_per_block,
        activation_bytes=max(footprint.activation_bytes, draft.activation_bytes),
        load_bytes=max(footprint.load_bytes, footprint.weight_bytes + draft.load_bytes),
    )
