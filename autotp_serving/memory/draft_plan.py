"""What --draft-model takes beside the model: weights and a cache of as many blocks. Every rank."""

from __future__ import annotations

from dataclasses import replace

from autotp_serving.config import ConfigError
from autotp_serving.memory.footprint import DRAFT_KIND, Footprint, MemorySetup
from autotp_serving.model.lengths import find_max_model_len


def find_draft_footprints(setup: MemorySetup) -> list[Footprint]:
    """The draft model's footprint on each rank.

    Raises:
        ConfigError: its folder cannot be planned for.
    """
    from autotp_serving.memory.planner import find_footprints, read_planned_config

    config = setup.config.of_draft(setup.max_model_len)
    try:
        model_config, known = read_planned_config(config)
        find_max_model_len(config, model_config)
        return find_footprints(replace(setup, config=config), model_config, known)
    except ConfigError as error:
        reason = str(error).removeprefix("--repo-id-or-model-path: ")
        raise ConfigError(f"--draft-model {config.model_path}: {reason}") from error


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
