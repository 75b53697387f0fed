"""Models by their names, fetched from a hub of our own by a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.model.checkpoints import save_tiny_llama
from tests.model.loopback_hub import TOKEN, Hub, run_hub
from tests.ranks.launch import ROOT, mpirun

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as repositories have it: with its weights in other formats too."""
    # With a file of more than the 10 MB that huggingface_hub takes at once.
    folder = save_tiny_llama(tmp_path_factory.mktemp("repo") / "tiny", vocab_size=24_000)
    (folder / "original").mkdir()
    for name in (
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"),
        *("model.fp16.safetensors", "tiny.Q4_0.gguf", "modeling_tiny.py", "README.md"),
        *("original/consolidated.00.pth", "original/params.json", ".gitattributes"),
    ):
        (folder / name).write_bytes(b"{}" * 100)
    return folder


@pytest.fixture
def hub(repo: Path) -> Iterator[Hub]:
    with run_hub(tiny=repo) as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Start the server on the loopback hub with a cache of its own, and wait until it leaves."""

    def run(*flags: str, num_ranks: int = 1, **environ: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
        }
        outside = {
            name: value for name, value in os.environ.items() if not name.startswith("HF_TOKEN")
        }
        launcher = [*mpirun(), "-np", str(num_ranks)] if num_ranks > 1 else []
        return subprocess.run(
            [*launcher, sys.executable, "serving.py", *flags],
            cwd=ROOT,
            env=outside | own | environ,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def the_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a server that could not start."""
    lines = [line for line in done.stderr.splitlines() if "serving.py: error:" in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


def test_a_plan_fetches_no_weights(run: Run, hub: Hub) -> None:
    done = run("--model", "org/tiny", "--plan", "--device-memory", "16GiB")
    assert done.returncode == 0 and "weights" in done.stdout.lower(), done.stderr
    assert "config.json" in hub.fetched()
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_what_is_needed_is_fetched_once_by_two_ranks_and_a_cut_is_mended(
    run: Run, hub: Hub, repo: Path, tmp_path: Path
) -> None:
    """Two ranks save the model low-bit, which loads it without a port."""
    index = json.loads((repo / "model.safetensors.index.json").read_text())
    weights = sorted(set(index["weight_map"].values()))
    largest = max(weights, key=lambda name: (repo / name).stat().st_size)
    hub.cut[largest] = 11 * 10**6
    done = run("--model", "org/tiny", "--save-low-bit", str(tmp_path / "saved"), num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / "config.json").exists()
    wanted = {*weights, "model.safetensors.index.json", "config.json", "generation_config.json"}
    assert hub.fetched() == wanted | {"tokenizer.json", "tokenizer_config.json"}
    ranges = [asked for method, name, asked in hub.log if (method, name) == ("GET", largest)]
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    others = [name for method, name, _ in hub.log if method == "GET" and name != largest]
    assert len(others) == len(set(others))
    assert "Downloading org/tiny" in done.stderr  # a line, as this is no terminal

    # From now on the cache does, with the hub and without.
    hub.log.clear()
    shutil.rmtree(tmp_path / "saved")
    assert run("--model", "org/tiny", "--save-low-bit", str(tmp_path / "saved")).returncode == 0
    assert not hub.log
    hub.calls.clear()
    done = run("--model", "org/tiny", "--plan", "--device-memory", "9GiB", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and not hub.calls, done.stderr
    done = run(
        "--model", "org/tiny", "--plan", "--device-memory", "9GiB", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.returncode == 0 and "what the cache holds is served" in done.stderr, done.stderr


def test_refusals_are_one_line_with_what_helps(run: Run, hub: Hub) -> None:
    line = the_line(run("--model", "org/unknown", "--plan"))
    assert "no folder 'org/unknown'" in line and hub.url in line and "hf auth login" in line
    line = the_line(run("--model", "org/tiny", "--plan", "--revision", "v9"))
    assert "no revision 'v9'" in line
    line = the_line(run("--model", "org/tiny", "--plan", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in line and "hf download org/tiny" in line
    line = the_line(run("--model", "org/tiny", "--plan", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9" in line and "hf download org/tiny" in line
    line = the_line(run("--model", "org/tiny", "--plan", "--hub", "modelscope"))
    assert "pip install modelscope" in line
    hub.status = 503
    assert "503" in the_line(run("--model", "org/tiny", "--plan"))


def test_a_gated_model_opens_with_a_token(run: Run, hub: Hub) -> None:
    hub.gated.add("org/tiny")
    line = the_line(run("--model", "org/tiny", "--plan", num_ranks=2))
    assert "is gated" in line and f"{hub.url}/org/tiny" in line and "HF_TOKEN" in line
    flags = ("--model", "org/tiny", "--plan", "--device-memory", "9GiB")
    assert run(*flags, HF_TOKEN=TOKEN).returncode == 0


def test_a_gguf_file_by_name(run: Run, hub: Hub, tmp_path: Path) -> None:
    """A plan fetches its head, and what it is served from low-bit is fetched whole."""
    pytest.importorskip("gguf")
    from tests.model.gguf_files import write_gguf

    folder = tmp_path / "repo"
    folder.mkdir()
    write_gguf(save_tiny_llama(tmp_path / "model"), folder / "tiny-Q8_0.gguf", "Q8_0")
    shutil.rmtree(folder / "tiny-Q8_0.decoded")
    (folder / "tiny-F16.gguf").write_bytes(b"GGUF")
    hub.repos["org/tiny-gguf"] = folder
    line = the_line(run("--model", "org/tiny-gguf", "--plan"))
    assert "name one of them, as org/tiny-gguf/tiny-F16.gguf" in line and "tiny-Q8_0" in line
    done = run("--model", "org/tiny-gguf:Q8_0", "--plan", "--device-memory", "9GiB")
    assert done.returncode == 0, done.stderr
    size = (folder / "tiny-Q8_0.gguf").stat().st_size
    asked = [range_ for method, name, range_ in hub.log if (method, name[-5:]) == ("GET", ".gguf")]
    assert asked and all(one and int(one.rpartition("-")[2]) < size // 4 for one in asked)
    flags = ("--save-low-bit", str(tmp_path / "saved"), "--low-bit", "sym_int8")
    done = run("--model", "org/tiny-gguf/tiny-Q8_0.gguf", *flags, num_ranks=2)
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "tokenizer.json", "autotp_low_bit.json"):
        assert (tmp_path / "saved" / name).exists()
    assert not list((tmp_path / "saved").glob("*.gguf"))


def test_a_plan_for_a_saved_model_fetches_the_heads_of_its_weights(
    run: Run, repo: Path, hub: Hub, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    assert run("--model", str(repo), "--save-low-bit", str(saved)).returncode == 0
    hub.repos["org/saved"] = saved
    flags = ("--plan", "--device-memory", "9GiB")
    done = run("--model", "org/saved", *flags)
    assert done.returncode == 0, done.stderr
    asked = [(name, range_) for _, name, range_ in hub.log if name.endswith(".safetensors")]
    assert asked and all(one == "bytes=0-131071" for _, one in asked)
    local = run("--model", str(saved), *flags)
    assert done.stdout.splitlines()[1:] == local.stdout.splitlines()[1:]
