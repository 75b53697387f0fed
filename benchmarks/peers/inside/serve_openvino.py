"""OpenVINO GenAI's continuous batching behind HTTP: `serve_openvino.py MODEL PORT THREADS`."""

import queue
import sys

import numpy as np
import openvino
import openvino_genai
from sse_server import Job, serve


def main() -> None:
    folder, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB, the least it takes
    scheduler.max_num_seqs = 8
    scheduler.enable_prefix_caching = False
    pipe = openvino_genai.ContinuousBatchingPipeline(
        folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    serve(port, jobs)
    running: dict[int, tuple[Job, object]] = {}
    number = 0
    while True:
        while not running or not jobs.empty():
            job = jobs.get()
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = job.max_tokens
            config.ignore_eos = True
            config.do_sample = False
            ids = openvino.Tensor(np.array([job.prompt], dtype=np.int64))
            running[number] = (job, pipe.add_request(number, ids, config))
            number += 1
        pipe.step()
        for key, (job, handle) in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    for token in output.generated_ids:
                        job.put(token)
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                job.end()
                del running[key]


if __name__ == "__main__":
    main()
