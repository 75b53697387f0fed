"""llama.cpp, built here from the sources in llama-cpp-python's package. No rank."""

from __future__ import annotations

import tarfile
from pathlib import Path

from benchmarks.peers.environments import INSIDE, Environment, make_once, run_logged, say
from benchmarks.peers.processes import Launch

VERSION = "0.3.36"
FORMATS = {"q4_0": "sym_int4", "q8_0": "sym_int8", "bf16": "bf16"}  # and ours that is most like it
TARGETS = ("llama-server",)
# The machine's own instructions; nothing of its web page, tests or TLS.
CMAKE_SETTINGS = (
    "CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip

ENVIRONMENT = Environment("llama_cpp")
BUILD = ENVIRONMENT.folder / "build"


def set_up() -> dict[str, str]:
    """Build the server; returns versions."""
    ENVIRONMENT.install(["install", "gguf==0.19.0", "numpy==2.4.6", "cmake", "ninja"])
    make_once(BUILD, repr((VERSION, CMAKE_SETTINGS)), build)
    return {"llama-cpp-python": VERSION} | ENVIRONMENT.versions("gguf")


def build() -> None:
    """Fetch the sources and compile them: about 15 minutes on two cores."""
    say(f"llama_cpp: compiling {VERSION} in {BUILD} (a quarter of an hour on two cores)")
    package = f"llama-cpp-python=={VERSION}"
    folder = ENVIRONMENT.folder
    fetch = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, package]
    archive = folder / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.is_file():
        run_logged((ENVIRONMENT.python, "-m", "pip", *fetch), ENVIRONMENT.log)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    sources = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    settings = [f"-D{setting}" for setting in CMAKE_SETTINGS]
    tools = ENVIRONMENT.python.parent
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    configure = (tools / "cmake", "-S", sources, "-B", BUILD, "-G", "Ninja", ninja, *settings)
    run_logged(configure, ENVIRONMENT.log)
    run_logged((tools / "cmake", "--build", BUILD, "--target", *TARGETS), ENVIRONMENT.log)


def launch(checkpoint: Path, name: str, threads: int) -> Launch:
    """The server with one format; eight places of 1,280 tokens."""
    file = ENVIRONMENT.folder / f"{checkpoint.name}-{name}.gguf"
    script = "write_gguf.py"

    def convert() -> None:
        say(f"llama_cpp: writing {file.name}")
        ENVIRONMENT.run(script, checkpoint, name, file)

    make_once(file, (INSIDE / script).read_text() + str(checkpoint), convert)
    words = [str(BUILD / "bin" / "llama-server"), "--model", str(file), "--host", "127.0.0.1"]
    words += ["--port", "{port}", "--threads", str(threads), "--threads-batch", str(threads)]
    words += ["--parallel", "8", "--ctx-size", str(8 * 1280), "--alias", "model"]
    return Launch(f"llama.cpp {name.upper()}", tuple(words), extra_body={"cache_prompt": False})
