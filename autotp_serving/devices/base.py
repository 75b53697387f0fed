"""The questions every device answers. Every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


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
        backend: the torch.distributed backend of its collectives.
    """

    kind: str
    torch_device: torch.device
    backend: str

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
