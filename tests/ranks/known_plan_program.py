"""Compare the shapes known from config.json alone with those of the model that AutoTP shards.

    python tests/ranks/known_plan_program.py NUM_RANKS FOLDER...

Prints a line for each folder and rank, which ends with "equal" or with what differs. One process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from autotp_serving.config import ServingConfig
from autotp_serving.memory.known_shapes import list_known_shapes, read_known_config
from autotp_serving.memory.meta_planner import list_ranks, shard_model
from autotp_serving.model.loader import read_model_config
from autotp_serving.model.shapes import ModelShapes
from autotp_serving.model.shards import describe_shapes


def compare(known: ModelShapes, sharded: ModelShapes) -> str:
    """Their order apart, which differs where a fused layer is taken apart."""
    odd = sorted(set(known.tensors) ^ set(sharded.tensors), key=repr)
    if odd or len(known.tensors) != len(sharded.tensors):
        return f"differ in {len(odd)} tensors: {odd[:4]}"
    rest = [(one.embedding_name, one.head.shape, one.dtype) for one in (known, sharded)]
    return "equal" if rest[0] == rest[1] else f"differ: {rest}"


def main() -> None:
    """Compare every rank's."""
    num_ranks = int(sys.argv[1])
    for folder in map(Path, sys.argv[2:]):
        config = ServingConfig(model_path=str(folder))
        known, model_config = read_known_config(folder), read_model_config(config)
        for group in list_ranks(num_ranks):
            shapes = list_known_shapes(known, group.rank, num_ranks, "bfloat16")
            sharded = describe_shapes(shard_model(config, model_config, group))
            print(folder.name, compare(shapes, sharded))


if __name__ == "__main__":
    main()
