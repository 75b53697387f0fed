"""The questions every device answers. Every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # --plan asks here before torch could be imported
    import torch

CARD_FILES = ("nvidia[0-9]*", "dri/renderD*", "dxg")
"""Below /dev: an NVIDIA card, any graphics card, a card under WSL."""


class DeviceError(RuntimeError):
    """A device that is missing or cannot be used; the message says how to mend it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory: all of it, and what nobody has taken."""

    total: int
    free: int


class Device(Protocol):
    """One accelerator, or this host's processor.

    Attributes:
        kind: "cpu", "cuda" or "xpu", the word torch and DeepSpeed use.
        torch_device: where tensors of this rank live.
        is_host: True where its memory is the host's and work is done when a call returns.
        backend: the torch.distributed backend of its collectives.
        max_in_flight: steps that may be begun before the oldest is collected: 2 where work is
            queued, so that one is ready when the other ends.
    """

    kind: str
    torch_device: torch.device
    is_host: bool
    backend: str
    max_in_flight: int

    @staticmethod
    def is_present() -> bool:
        """True when this process can use at least one such device."""
        ...

    def memory(self) -> Memory:
        """Memory as the device sees it now."""
        ...

    def peak_memory(self) -> int:
        """Most bytes this process held on the device since `reset_peak_memory`."""
        ...

    def reset_peak_memory(self) -> None:
        """Forget the peak; a no-op where the peak cannot be forgotten."""
        ...

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        ...

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor to the host; the function waits for it and returns it."""
        ...


def fetch_by_event(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """`Device.fetch` where work is queued: into pinned memory, behind what is queued by now."""
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.Event(tensor.device)
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait


def is_host_name(kind: str) -> bool:
    """Whether a device of this kind is the host itself."""
    return kind == "cpu"


def has_card_files() -> bool:
    """False where no card can be seen, whatever torch was built for."""
    return any(any(Path("/dev").glob(pattern)) for pattern in CARD_FILES)


def read_host_memory() -> Memory:
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
