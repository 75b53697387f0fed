"""Our own server, as `mpirun` starts it. No rank."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.environments import ROOT, PeerError
from benchmarks.peers.processes import Launch

CACHE_TOKENS = 8 * 1280  # room for the eight requests of the widest task


def count_cache_bytes(checkpoint: Path) -> int:
    """Bytes of a BF16 KV cache for `CACHE_TOKENS`, over all ranks."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    per_layer = 2 * 2 * config.get("num_key_value_heads", heads) * width
    return CACHE_TOKENS * per_layer * config["num_hidden_layers"]


def launch_ours(checkpoint: Path, spec: str, cache_bytes: int) -> Launch:
    """`spec` is FORMAT[/HEAD]:RANKSxTHREADS, as sym_int4:2x1 or sym_int4/sym_int4:1x2.

    Raises PeerError when it is spelt otherwise.
    """
    formats, _, layout = spec.partition(":")
    low_bit, _, head = formats.partition("/")
    ranks, _, threads = (layout or "2x1").partition("x")
    if not (low_bit and ranks.isdigit() and threads.isdigit()):
        raise PeerError(f"--ours {spec}: write FORMAT:RANKSxTHREADS, as sym_int4:2x1")
    words = [sys.executable, "serving.py", "--repo-id-or-model-path", str(checkpoint)]
    words += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", "{port}"]
    words += ["--device", "cpu", "--low-bit", low_bit, "--log-level", "warning"]
    words += ["--max-num-seqs", "8", "--kv-cache-memory", str(cache_bytes // int(ranks))]
    words += ["--lm-head-low-bit", head] if head else []
    environment = {"OMP_NUM_THREADS": threads, "KMP_BLOCKTIME": "1", "PYTHONUNBUFFERED": "1"}
    if int(ranks) > 1:
        mpirun = Path(sys.executable).with_name("mpirun")
        if not mpirun.is_file():
            raise PeerError(f"{mpirun} is not there: run this in run_demo.sh's environment")
        words = [str(mpirun), "-np", ranks, *words]
        # As the launch scripts do it: pinned, every rank would take the same first cores.
        environment["KMP_AFFINITY"] = "disabled"
    name = f"ours {formats}, {ranks} rank{'s' if int(ranks) > 1 else ''} x {threads} thread"
    return Launch(name + ("s" if int(threads) > 1 else ""), tuple(words), environment)


MEASURED = ("autotp_serving", "serving.py", "requirements.txt")


def describe_ours() -> str:
    """The commit that is measured, for the table: the last that changed the server."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words, "--", *MEASURED]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git") or not (commit := git("log", "-1", "--format=%h")):
        return "ours"
    return f"ours at {commit}" + (" with changes" if git("status", "--porcelain") else "")
