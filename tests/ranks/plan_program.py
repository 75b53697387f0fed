"""Write what each rank's weights and cache blocks take: as planned in one process, or as loaded.

    python tests/ranks/plan_program.py MODEL IN.json OUT.json             # planned
    mpirun -np N python tests/ranks/plan_program.py MODEL IN.json OUT.json  # loaded

IN.json: {"num_ranks": int, "settings": {ServingConfig fields}}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import join_group
from autotp_serving.memory.footprint import MemorySetup, count_loaded
from autotp_serving.memory.planner import find_footprints
from autotp_serving.model.loader import read_model_config
from autotp_serving.worker.worker import start_worker


def main() -> None:
    """Plan, or load."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    config = ServingConfig(model_path=model_path, **job["settings"])
    group = join_group(os.environ)
    if group.size == 1:
        setup = MemorySetup(config, 2048, True, job["num_ranks"], job["num_ranks"])
        planned = find_footprints(setup, read_model_config(config))
        found = [[item.weight_bytes, item.kv_bytes_per_block] for item in planned]
    else:
        worker = start_worker(config, group)
        block_bytes = worker.cache.num_bytes // worker.cache.num_blocks
        found = group.all_gather([count_loaded(worker.model), block_bytes])
    if group.rank == 0:
        Path(out_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
