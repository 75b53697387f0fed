"""Run under mpirun: answer prompts with new files for KV blocks, with those that are left, and with
a block of them damaged on the last rank.

    mpirun -np N python tests/ranks/offload_program.py MODEL FOLDER

Prints for each the tokens of the answers and how many tokens of the prompts were not computed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from autotp_serving import LLM, SamplingParams

PROMPTS = [list(range(10, 140)), [*range(10, 60), *range(300, 340)]]


def answer(model_path: str, **settings: Any) -> None:
    """One server's life."""
    try:
        with LLM(model_path, low_bit="bf16", kv_cache_memory=2**24, **settings) as llm:
            params = SamplingParams(max_tokens=40, ignore_eos=True)
            tokens = [llm.generate([one], params, show_progress=False) for one in PROMPTS]
            num_hits = llm._engine.scheduler.num_prefix_hit_tokens
    except SystemExit:  # how a rank other than 0 leaves LLM; here it has more to do
        return
    print(json.dumps([[one.token_ids for [one] in tokens], num_hits]), flush=True)


def main() -> None:
    """All three."""
    model_path, folder = sys.argv[1:]
    answer(model_path, kv_offload_dir=folder)
    answer(model_path, kv_offload_dir=folder)
    rank, num_ranks = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    if rank == num_ranks - 1:
        path = Path(folder) / f"rank-{rank}.blocks"
        data = bytearray(path.read_bytes())
        data[0] ^= 1  # of the block that was written first
        path.write_bytes(data)
    answer(model_path, kv_offload_dir=folder)


if __name__ == "__main__":
    main()
