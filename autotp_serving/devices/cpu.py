"""This host's processor. Every rank of a CPU server."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

import torch

from autotp_serving.devices.base import Memory, read_host_memory

PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRODUCTS_KEPT = 64
"""oneDNN and torch's way to it each keep a compiled product for every weight's shape and number of
tokens they have met: 1,024 unless told otherwise, of about 0.7 MB. A server meets every number."""


class CpuDevice:
    """The cores and memory of this host, shared by its ranks."""

    kind = "cpu"
    is_host = True
    backend = "gloo"
    max_in_flight = 1

    def __init__(self, local_rank: int) -> None:
        self.torch_device = torch.device("cpu")
        for name in PRODUCT_CACHES:  # read when the first product is computed
            os.environ.setdefault(name, str(PRODUCTS_KEPT))

    @staticmethod
    def is_present() -> bool:
        """Always: there is no host without one."""
        return True

    def memory(self) -> Memory:
        """Host memory; see read_host_memory."""
        return read_host_memory()

    def peak_memory(self) -> int:
        """Peak resident set of this process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        """The operating system keeps the peak for good."""

    def synchronize(self) -> None:
        """CPU work is done when the call returns."""

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """It is here already."""
        return lambda: tensor
