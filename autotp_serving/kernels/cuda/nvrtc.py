"""CUDA C++ to kernels that can be launched: NVRTC, a cache on disk, the driver. Ranks on CUDA.

NVRTC comes with torch; neither a compiler nor CUDA's headers are needed. A kernel is launched so
that it may begin while the one before it ends, which only kernels that call `wait_for_inputs`
(csrc/common.cuh) can bear.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autotp_serving.devices.build import BuildError, cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

OVERLAP_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SHARED_MEMORY_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PLAIN_SHARED_MEMORY = 24 * 2**10  # dynamic, beside what a kernel declares
OVERLAP_CAPABILITY = (9, 0)


class Long(int):
    """An integer that a kernel takes in 64 bits."""


Argument = Tensor | int | float | bytes | None


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """One compiled function on the card it was loaded on; for one thread at a time.

    The host's time for a launch is what a step without a graph is made of, so that everything the
    driver is given is written into memory that is kept.
    """

    def __init__(self, function: ctypes.c_void_p, device_index: int, overlaps: bool) -> None:
        self._function = function
        self._device_index = device_index
        self._launch = _driver().cuLaunchKernelEx
        self._overlap = (_Attribute * 1)(_Attribute(OVERLAP_ATTRIBUTE, b"", 1, b""))
        self._overlaps = overlaps
        self._shared_bytes = PLAIN_SHARED_MEMORY
        self._config = _LaunchConfig(attributes=self._overlap)
        self._config_pointer = ctypes.byref(self._config)
        self._packings: dict[tuple[type, ...], _Packing] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        overlaps: bool = True,
    ) -> None:
        """Launch on torch's current stream.

        Args:
            grid: thread blocks in x, y and z; 1 where it is shorter.
            block: threads in each.
            arguments: as the kernel declares them; integers are 32-bit unless `Long`, None is a
                null pointer, bytes are a structure by value.
            overlaps: the kernel waits for its inputs by itself.

        Raises:
            RuntimeError: the driver refuses.
        """
        if shared_bytes > self._shared_bytes:
            _check(
                _driver().cuFuncSetAttribute(
                    self._function, SHARED_MEMORY_ATTRIBUTE, ctypes.c_int(shared_bytes)
                )
            )
            self._shared_bytes = shared_bytes
        kinds = tuple(map(type, arguments))
        packing = self._packings.get(kinds)
        if packing is None:
            packing = self._packings[kinds] = _Packing(arguments)
        packing.write(arguments)
        config = self._config
        config.grid[:] = (*grid, 1, 1)[:3]
        config.block[:] = (block, 1, 1)
        config.shared_bytes = shared_bytes
        config.stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        config.num_attributes = overlaps and self._overlaps
        _check(self._launch(self._config_pointer, self._function, packing.pointers, None))


class _Packing:
    """Memory for arguments of the same types and lengths as those given, one after another.

    Attributes:
        pointers: to each of them, as the driver wants it.
    """

    def __init__(self, arguments: Sequence[Argument]) -> None:
        layout, offsets = "", []
        for value in arguments:
            code = f"{len(value)}s" if isinstance(value, bytes) else _CODES[type(value)]
            layout += code  # native: aligned as in C
            offsets.append(struct.calcsize(layout) - struct.calcsize(code))
        self._pack = struct.Struct(layout).pack_into
        self._values = ctypes.create_string_buffer(struct.calcsize(layout))
        start = ctypes.addressof(self._values)
        self.pointers = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))

    def write(self, arguments: Sequence[Argument]) -> None:
        """Put values in; the driver copies them at the launch."""
        values = [
            value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
            for value in arguments
        ]
        self._pack(self._values, 0, *values)


_CODES: dict[type, str] = {
    type(None): "P",
    Tensor: "P",
    nn.Parameter: "P",
    Long: "q",
    int: "i",
    float: "f",
}


@functools.cache
def load_kernel(
    source: str, name: str, defines: tuple[tuple[str, str], ...], device_index: int
) -> Kernel:
    """A kernel of csrc/, compiled for the card or found compiled.

    Args:
        source: the file in csrc/.
        name: of the function.
        defines: what its macros stand for.
        device_index: the card, which must be the current one.

    Raises:
        BuildError: NVRTC is missing, or refuses the source.
    """
    capability = torch.cuda.get_device_capability(device_index)
    function = ctypes.c_void_p()
    module = _load_module(source, defines, device_index)
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return Kernel(function, device_index, capability >= OVERLAP_CAPABILITY)


@functools.cache
def _load_module(
    source: str, defines: tuple[tuple[str, str], ...], device_index: int
) -> ctypes.c_void_p:
    torch.cuda.current_stream().cuda_stream  # noqa: B018 (makes the card's context)
    binary = compile_source(source, dict(defines), name_architecture(device_index))
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), binary))
    return module


def name_architecture(device_index: int) -> str:
    """The card's, for NVRTC; Hopper's with what only Hopper has."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def compile_source(source: str, defines: Mapping[str, str], architecture: str) -> bytes:
    """Machine code of a source in csrc/, from the cache where it has been compiled before.

    Raises:
        BuildError: with the compiler's first error.
    """
    text = (SOURCES / source).read_text()
    for header in sorted(SOURCES.glob("*.cuh")):
        text = text.replace(
            f'#include "{header.name}"', header.read_text().replace("#pragma once", "")
        )
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    digest = hashlib.sha256("\0".join([torch.version.cuda or "", *options, text]).encode())
    cached = cache_folder() / "cuda" / f"{Path(source).stem}-{digest.hexdigest()[:24]}.cubin"
    try:
        return cached.read_bytes()
    except OSError:
        pass  # not compiled yet
    binary = _run_nvrtc(source, text, options)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, cached)
    except OSError as error:
        logger.warning("Compiled kernels cannot be kept in %s: %s", cached.parent, error)
    return binary


def _run_nvrtc(name: str, text: str, options: list[str]) -> bytes:
    library = _nvrtc()
    program = ctypes.c_void_p()
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    try:
        if library.nvrtcCompileProgram(program, len(options), array):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            lines = [line for line in log.value.decode().splitlines() if "error" in line]
            raise BuildError(f"NVRTC refuses {name}: {(lines or ['no reason given'])[0]}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, binary)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").partition(".")[0]
    names = [f"libnvrtc.so.{major}"]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    names += [str(path) for path in sorted(packages.glob(f"*/lib/libnvrtc.so.{major}"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError(f"there is no NVRTC ({names[0]}), which comes with torch's CUDA build")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {text.value.decode() if text.value else code}")
