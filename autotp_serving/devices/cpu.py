"""This host's processor. Every rank of a CPU server."""

from __future__ import annotations

import resource

import torch

from autotp_serving.devices.base import Memory, read_host_memory


class CpuDevice:
    """The cores and memory of this host, shared by its ranks."""

    kind = "cpu"
    backend = "gloo"

    def __init__(self, local_rank: int) -> None:
        self.torch_device = torch.device("cpu")

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
