"""Run under mpirun: answer the prompts of a JSON file with `LLM`, write token ids as JSON.

    mpirun -np N python tests/ranks/generate_program.py MODEL IN.json OUT.json

IN.json: {"prompts": [[token ids]], "max_tokens": [int], "settings": {ServingConfig fields},
"max_in_flight": int}; the last is 1 where it is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from autotp_serving import LLM, SamplingParams
from autotp_serving.devices.cpu import CpuDevice


def main() -> None:
    """Answer and write."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    CpuDevice.max_in_flight = job.get("max_in_flight", 1)
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in job["max_tokens"]]
    with LLM(model_path, **job["settings"]) as llm:
        completions = llm.generate(job["prompts"], params, show_progress=False)
    Path(out_path).write_text(json.dumps([item.token_ids for item in completions]))


if __name__ == "__main__":
    main()
