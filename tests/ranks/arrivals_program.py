"""Run under mpirun: requests that arrive between steps, at random; greedy tokens as JSON.

    mpirun -np N python tests/ranks/arrivals_program.py MODEL IN.json OUT.json

IN.json: {"prompts": [[token ids]], "max_tokens": int, "settings": {ServingConfig fields}}.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import join_group
from autotp_serving.engine import Engine
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.request import Request, RequestOutput, SamplingParams
from autotp_serving.worker.worker import start_worker


def main() -> None:
    """Submit with probability 0.3 before each step, until all are answered."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    config = ServingConfig(model_path=model_path, **job["settings"])
    worker = start_worker(config, join_group(os.environ))
    if worker.lead is None:
        worker.runner.follow(worker.channel)
        return
    answers: dict[str, list[int]] = {}

    def collect(outputs: list[RequestOutput]) -> None:
        for output in outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)

    tokenizer = HuggingFaceTokenizer(Path(model_path))
    engine = Engine(worker.lead, tokenizer, config, worker.max_model_len, collect)
    params = SamplingParams(max_tokens=job["max_tokens"])
    waiting = [
        Request(str(index), tuple(prompt), params, time.monotonic())
        for index, prompt in enumerate(job["prompts"])
    ]
    rng = random.Random(3)
    while waiting or engine.has_work:
        if waiting and (not engine.has_work or rng.random() < 0.3):
            engine.submit(waiting.pop())
        engine.step()
    assert engine.stats().num_held_blocks == 0
    worker.lead.stop()
    Path(out_path).write_text(json.dumps([answers[str(i)] for i in range(len(job["prompts"]))]))


if __name__ == "__main__":
    main()
