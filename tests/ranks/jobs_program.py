"""Run under mpirun: several models one after the other, so that the imports are paid for once.

    mpirun -np N python tests/ranks/jobs_program.py IN.json OUT.json

IN.json: [{"model": folder, "prompts": [[token ids]], "max_tokens": int, "settings": {}}]; OUT.json:
for each, the token ids of its answers, or the one line with which it was refused. With "pooling" in
place of "max_tokens", fields of `Pooling`, for each the vectors of its prompts.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from pathlib import Path
from typing import Any

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.layers import low_bit_linear
from autotp_serving.request import Pooling


def answer(job: dict[str, Any]) -> list[list[int]] | list[list[float]] | str | None:
    """Answer one job's prompts; nothing on ranks other than 0."""
    if "pooling" in job:
        params = SamplingParams(max_tokens=0, pooling=Pooling(**job["pooling"]))
    else:
        params = SamplingParams(max_tokens=job["max_tokens"], ignore_eos=True)
    try:
        with LLM(job["model"], **job["settings"]) as llm:
            completions = llm.generate(job["prompts"], params, show_progress=False)
    except ConfigError as error:
        return str(error)
    except SystemExit:  # how a rank other than 0 leaves LLM; here it has more to do
        return None
    if "pooling" in job:
        return [array("f", item.pooled).tolist() for item in completions]
    return [item.token_ids for item in completions]


def main() -> None:
    """Answer and write."""
    # The CPU kernels also round activations, in groups that depend on the number of ranks.
    low_bit_linear.load_library = lambda format: None
    in_path, out_path = map(Path, sys.argv[1:])
    answers = [answer(job) for job in json.loads(in_path.read_text())]
    if answers[0] is not None and os.environ.get("PMI_RANK", "0") == "0":
        out_path.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
