"""OpenVINO GenAI's continuous batching. No rank."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.environments import INSIDE, Environment, make_once, run_logged, say
from benchmarks.peers.processes import Launch

VERSION = "2026.4.1.0"
EXPORTERS = ("optimum-intel==2.2.0", "nncf==3.4.0")
TORCH = "2.13.0"
FORMATS = {"int4": "sym_int4", "int8": "sym_int8"}  # and ours that is most like it
EXPORT = {
    "int4": ("--weight-format", "int4", "--group-size", "128", "--ratio", "1.0", "--sym"),
    "int8": ("--weight-format", "int8"),
}

ENVIRONMENT = Environment("openvino_genai")


def set_up() -> dict[str, str]:
    """Install; returns versions. torchvision, where it comes along, breaks the export."""
    ENVIRONMENT.install(
        # torch once more: or torchvision would bring a newer one, with CUDA.
        ["install", f"openvino-genai=={VERSION}", *EXPORTERS, f"torch=={TORCH}"],
        ["uninstall", "--yes", "torchvision"],
        torch=TORCH,
    )
    return ENVIRONMENT.versions("openvino-genai", "openvino", "optimum-intel", "nncf")


def launch(checkpoint: Path, name: str, threads: int) -> Launch:
    """The pipeline behind a small HTTP server, with 1 GB of KV cache, the least it takes."""
    folder = ENVIRONMENT.folder / f"{checkpoint.name}-{name}"
    cli = str(ENVIRONMENT.python.with_name("optimum-cli"))
    words = (cli, "export", "openvino", "--model", str(checkpoint), "--task")
    words += ("text-generation-with-past", *EXPORT[name], str(folder))

    def convert() -> None:
        say(f"openvino_genai: exporting {folder.name}")
        run_logged(words, ENVIRONMENT.log, {"HF_HUB_OFFLINE": "1"})

    make_once(folder, repr(words), convert)
    script = str(INSIDE / "serve_openvino.py")
    command = (str(ENVIRONMENT.python), script, str(folder), "{port}", str(threads))
    return Launch(f"OpenVINO GenAI {name.upper()}", command)
