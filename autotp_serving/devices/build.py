"""Native code compiled at first use, once per machine. Any rank; torch only inside functions.

A build that dies must not stop later starts. So the lock is one that the operating system frees
with its holder, and a library gets its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

BUILD_TIMEOUT = 600.0
HEADERS = Path(__file__).parents[1] / "kernels" / "cpu" / "csrc"

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"}
AMX = {"amx_tile", "amx_int8", "amx_bf16"}


class Isa(NamedTuple):
    """Instructions to compile for: which processor flags they need, and what does it."""

    needs: frozenset[str]
    march: str
    vectors: str
    tiles: str


# Best first. Nobody needs the emulation but the tests.
ISAS = {
    "amx": Isa(frozenset(AVX512 | AMX), "native", "avx512", "amx"),
    "avx512": Isa(frozenset(AVX512), "native", "avx512", "none"),
    "avx2": Isa(frozenset({"avx2", "fma", "f16c"}), "haswell", "avx2", "none"),
    "amx_emulated": Isa(frozenset(AVX512), "native", "avx512", "emulated"),
}


class BuildError(RuntimeError):
    """A library cannot be compiled here; says in one line why."""


def find_reason(output: str) -> str:
    """The line of a compiler's output that tells what is wrong.

    That the linker has failed, and which commands there were, comes with every error.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if re.search(r"error:|cannot find|No such file|not found", line)
        and not line.startswith("collect2:")
    ]
    return (telling or lines or ["no reason given"])[0][:300]


@contextlib.contextmanager
def remember_failure(path: Path) -> Iterator[None]:
    """Build once; what has failed is not tried again at every start.

    Args:
        path: where the reason is kept; its name tells apart all that the outcome depends on.

    Raises:
        BuildError: the build's own, now or at an earlier start.
    """
    if path.exists():
        raise BuildError(f"{path.read_text()} (at an earlier start; to try again: rm '{path}')")
    try:
        yield
    except BuildError as error:
        path.write_text(str(error))
        raise


def cache_folder() -> Path:
    """Where compiled code is kept, ours and torch's extensions: one folder per environment.

    The compiler's command names the environment's paths, so two environments that shared a
    folder would recompile at every start.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    versions = f"{sys.prefix} {sys.version} {metadata.version('torch')}"
    environment = hashlib.sha256(versions.encode()).hexdigest()[:12]
    return cache / "autotp_serving" / environment


@contextlib.contextmanager
def hold_build_lock(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from building in `folder`, and wait for them.

    Torch's own lock is a file `lock` that a killed build leaves behind, and on which every later
    start would wait for ever; under our lock such a file can only be a leftover.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Waiting for another process that compiles %s", folder.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def build_library(name: str, source: Path, flags: Sequence[str]) -> Path:
    """Compile a C++ source without torch headers into a shared library, or find it compiled.

    The library runs its OpenMP loops in the threads that torch has. It is compiled again when a
    file beside the source, a flag, the compiler or the processor changes.

    Raises:
        BuildError: there is no compiler, or it fails, or the cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError(f"no C++ compiler ({os.environ.get('CXX', 'g++')})")
    openmp = _loaded_openmp()
    command = [compiler, "-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", f"-I{HEADERS}"]
    command += [*flags, str(source)]
    if openmp is not None:
        # Named first, torch's copy is the one that is needed; -fopenmp's own then is not.
        command += ["-Wl,--no-as-needed", str(openmp), "-Wl,--as-needed"]
    digest = hashlib.sha256(repr(command).encode())
    digest.update(str(Path(compiler).stat().st_mtime_ns).encode())
    digest.update(_processor().encode())
    for path in (*sorted(HEADERS.iterdir()), *sorted(source.parent.iterdir())):
        if path.is_file():
            digest.update(path.read_bytes())
    folder = cache_folder() / name
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_build_lock(folder), remember_failure(library.with_suffix(".failed")):
            if not library.exists():
                _compile(name, command, library)
    except OSError as error:
        raise BuildError(f"cannot write {folder}: {error}") from error
    return library


def processor_flags() -> set[str]:
    """What Linux says this processor has; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def best_isa() -> str:
    """The name of the best instruction set here; raises BuildError where there is none."""
    flags = processor_flags()
    for name, isa in ISAS.items():
        if isa.needs <= flags:
            return name
    raise BuildError("this processor has neither AVX-512 VNNI nor AVX2")


def isa_flags(name: str) -> tuple[str, ...]:
    """How a source that includes ISA_VECTORS and ISA_TILES is compiled for an instruction set."""
    isa = ISAS[name]
    return (
        f"-march={isa.march}",
        "-fno-math-errno",
        # gcc 12 takes its own AVX-512 header's undefined values for mistakes.
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        f'-DISA_VECTORS="vectors_{isa.vectors}.h"',
        f'-DISA_TILES="tiles_{isa.tiles}.h"',
    )


def _compile(name: str, command: list[str], library: Path) -> None:
    """Compile beside the final place, then move there in one step."""
    logger.info("Compiling %s (once per machine, some seconds)", name)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        try:
            done = subprocess.run(
                [*command, "-o", str(output)], capture_output=True, text=True, timeout=BUILD_TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {BUILD_TIMEOUT:.0f} s") from error
        if done.returncode:
            raise BuildError(f"{command[0]}: {find_reason(done.stderr)}")
        output.rename(library)


def _loaded_openmp() -> Path | None:
    """The OpenMP library that torch uses in this process; a second one would have threads of its
    own.
    """
    import torch

    return find_openmp(Path("/proc/self/maps").read_text(), Path(torch.__file__).parent)


def find_openmp(maps: str, torch_folder: Path) -> Path | None:
    """Torch's own OpenMP library, else any that is there.

    Other packages (sentencepiece, scikit-learn) bring theirs, before torch or after.

    Args:
        maps: what the process has mapped, as /proc/self/maps tells it; paths may hold blanks.
    """
    paths = {Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines() if line.strip()}
    found = [
        path
        for name in ("libgomp", "libiomp5", "libomp")
        for path in sorted(paths)
        if path.name.startswith(name)
    ]
    own = [path for path in found if torch_folder in path.parents]
    return next(iter(own + found), None)


def _processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = ("model name", "flags")
    return "\n".join(next((x for x in lines if x.startswith(name)), "") for name in names)
