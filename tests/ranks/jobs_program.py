"""Run under mpirun: several models one after the other, so that the imports are paid for once.

    mpirun -np N python tests/ranks/jobs_program.py IN.json OUT.json

IN.json: [{"model": folder, "prompts": [[token ids]], "max_tokens": int or one for each prompt,
"settings": {ServingConfig fields}}]; OUT.json: for each, the token ids of its answers, or the one
line with which it was refused. What a job may have besides:

- "params": SamplingParams fields for each prompt. Its answers are then token ids, logprobs and
  prompts' logprobs.
- "adapters": the adapter of each prompt, or null.
- "max_in_flight": steps at once.
- "small_bytes": steps with fewer bytes of logits have them gathered whole.
- "pooling", in place of "max_tokens": fields of `Pooling`. It is answered by the prompts' vectors.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from dataclasses import astuple
from pathlib import Path
from typing import Any

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.layers import low_bit_linear
from autotp_serving.request import Pooling
from autotp_serving.worker import step_logits

SMALL_BYTES = step_logits.SMALL_BYTES


def make_params(job: dict[str, Any]) -> list[SamplingParams]:
    """What is asked for each prompt."""
    count = len(job["prompts"])
    if "pooling" in job:
        return [SamplingParams(max_tokens=0, pooling=Pooling(**job["pooling"]))] * count
    lens = job["max_tokens"]
    return [
        SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True} | fields))
        for max_tokens, fields in zip(
            lens if isinstance(lens, list) else [lens] * count,
            job.get("params", [{}] * count),
            strict=True,
        )
    ]


def answer(job: dict[str, Any]) -> list[Any] | str | None:
    """Answer one job's prompts; nothing on ranks other than 0."""
    CpuDevice.max_in_flight = job.get("max_in_flight", 1)
    step_logits.SMALL_BYTES = job.get("small_bytes", SMALL_BYTES)
    try:
        with LLM(job["model"], **job["settings"]) as llm:
            completions = llm.generate(
                job["prompts"],
                make_params(job),
                adapter=job.get("adapters"),
                show_progress=False,
            )
    except ConfigError as error:
        return str(error)
    except SystemExit:  # how a rank other than 0 leaves LLM; here it has more to do
        return None
    if "pooling" in job:
        return [array("f", item.pooled).tolist() for item in completions]
    if "params" in job:
        return [(item.token_ids, item.logprobs, item.prompt_logprobs) for item in completions]
    return [item.token_ids for item in completions]


def main() -> None:
    """Answer and write."""
    # The CPU kernels also round activations, in groups that depend on the number of ranks.
    low_bit_linear.load_library = lambda format: None
    in_path, out_path = map(Path, sys.argv[1:])
    answers = [answer(job) for job in json.loads(in_path.read_text())]
    if answers[0] is not None and os.environ.get("PMI_RANK", "0") == "0":
        out_path.write_text(json.dumps(answers, default=astuple))


if __name__ == "__main__":
    main()
