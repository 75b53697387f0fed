"""Write what each rank's weights and cache pages take: as planned in one process, or as loaded.

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
from autotp_serving.model.footprint import count_loaded
from autotp_serving.model.loader import read_model_config
from autotp_serving.model.meta_planner import find_footprints
from autotp_serving.ranks import join_control
from autotp_serving.worker import start_worker


def main() -> None:
    """Plan, or load."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    config = ServingConfig(model_path=model_path, **job["settings"])
    control = join_control(os.environ)
    if control.size == 1:
        planned = find_footprints(
            config, read_model_config(config), job["num_ranks"], 2048, on_cpu=True
        )
        found = [[item.weight_bytes, item.kv_bytes_per_block] for item in planned]
    else:
        worker = start_worker(config, control)
        page_bytes = worker.cache.num_bytes // worker.cache.num_blocks
        found = control.all_gather([count_loaded(worker.model), page_bytes])
    if control.rank == 0:
        Path(out_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
