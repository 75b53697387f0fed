"""This host's processor. Every rank of a CPU server."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from autotp_serving.devices.base import Memory


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
        """Host memory, within the limit of this process's control group if it has one."""
        fields = {}
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":")
            fields[name] = int(value.split()[0]) * 1024
        total, free = fields["MemTotal"], fields["MemAvailable"]
        limit_file = Path("/sys/fs/cgroup/memory.max")
        used_file = Path("/sys/fs/cgroup/memory.current")
        if limit_file.exists() and used_file.exists():
            limit = limit_file.read_text().strip()
            if limit != "max":
                total = min(total, int(limit))
                free = min(free, max(0, int(limit) - int(used_file.read_text())))
        return Memory(total=total, free=free)

    def peak_memory(self) -> int:
        """Peak resident set of this process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        """The operating system keeps the peak for good."""

    def synchronize(self) -> None:
        """CPU work is done when the call returns."""
