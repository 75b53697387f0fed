"""transformers' `generate` behind HTTP: `serve_transformers.py CHECKPOINT PORT THREADS`.

Requests that come within a moment of each other run as one static batch, the others afterwards.
"""

import queue
import sys
import time

import torch
from sse_server import Job, serve
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

MOMENT = 0.05


class BatchStreamer(BaseStreamer):
    """Hands each step's tokens to their jobs; the first call brings the prompts."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._has_prompts = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompts:
            for job, token in zip(self._jobs, value.flatten().tolist(), strict=True):
                job.put(token)
        self._has_prompts = True

    def end(self) -> None:
        for job in self._jobs:
            job.end()


def main() -> None:
    folder, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    serve(port, jobs)
    while True:
        batch = [jobs.get()]
        time.sleep(MOMENT)
        while not jobs.empty():
            batch.append(jobs.get())
        # A batch must be of one shape; ours always are.
        ids = torch.tensor([job.prompt for job in batch])
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=batch[0].max_tokens,
                do_sample=False,
                streamer=BatchStreamer(batch),
            )


if __name__ == "__main__":
    main()
