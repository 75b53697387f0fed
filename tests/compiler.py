"""Whether kernels can be compiled here. Where they can, a test may not skip because one is not."""

from __future__ import annotations

import os
import shutil

import pytest

from autotp_serving.devices.build import ISAS, processor_flags


def can_compile() -> bool:
    """A compiler is there, and a processor that some of the kernels are for."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and ISAS["avx2"].needs <= processor_flags()


needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
