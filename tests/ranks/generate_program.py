"""Run under mpirun: answer the prompts of a JSON file with `LLM`, write token ids as JSON.

    mpirun -np N python tests/ranks/generate_program.py MODEL IN.json OUT.json

IN.json: {"prompts": [[token ids]], "max_tokens": [int], "settings": {ServingConfig fields},
"max_in_flight": int, "params": [{SamplingParams fields}], "small_bytes": int}. Of these the last
three may be left out. With params for each prompt, OUT.json has their token ids, logprobs and
prompts' logprobs. Steps with fewer bytes of logits than `small_bytes` have them gathered whole.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path

from autotp_serving import LLM, SamplingParams
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.worker import step_logits


def main() -> None:
    """Answer and write."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    CpuDevice.max_in_flight = job.get("max_in_flight", 1)
    step_logits.SMALL_BYTES = job.get("small_bytes", step_logits.SMALL_BYTES)
    asked = job.get("params", [{}] * len(job["prompts"]))
    params = [
        SamplingParams(**({"max_tokens": count, "ignore_eos": True} | fields))
        for count, fields in zip(job["max_tokens"], asked, strict=True)
    ]
    with LLM(model_path, **job["settings"]) as llm:
        completions = llm.generate(job["prompts"], params, show_progress=False)
    found = [item.token_ids for item in completions]
    if "params" in job:
        found = [(item.token_ids, item.logprobs, item.prompt_logprobs) for item in completions]
    Path(out_path).write_text(json.dumps(found, default=astuple))


if __name__ == "__main__":
    main()
