"""One Intel GPU per rank, through stock torch. Written from documentation, not run on hardware.

Stock torch speaks to Intel GPUs since 2.5 and has their collectives ("xccl") since 2.8. With an
older torch, oneccl_bind_pt registers the backend "ccl" when it is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.distributed as dist

from autotp_serving.devices.base import DeviceError, Memory, fetch_by_event


class XpuDevice:
    """The Intel GPU with this rank's number on its host."""

    kind = "xpu"
    is_host = False
    max_in_flight = 2

    def __init__(self, local_rank: int) -> None:
        if not self.is_present():
            raise DeviceError(
                "torch sees no Intel GPU: install requirements/xpu.txt, check that sycl-ls lists "
                "the card and that you belong to the groups video and render."
            )
        count = torch.xpu.device_count()
        if local_rank >= count:
            raise DeviceError(
                f"rank {local_rank} of this host has no Intel GPU: {count} visible. "
                "Start fewer ranks, or check sycl-ls and ZE_AFFINITY_MASK."
            )
        self.torch_device = torch.device("xpu", local_rank)
        torch.xpu.set_device(local_rank)
        self.backend = self._find_backend()

    @staticmethod
    def is_present() -> bool:
        """True when torch sees an Intel GPU."""
        return hasattr(torch, "xpu") and torch.xpu.is_available()

    @staticmethod
    def _find_backend() -> str:
        if getattr(dist, "is_xccl_available", lambda: False)():
            return "xccl"
        if importlib.util.find_spec("oneccl_bindings_for_pytorch") is not None:
            import oneccl_bindings_for_pytorch  # noqa: F401  registers the backend

            return "ccl"
        raise DeviceError(
            "this torch has no collectives for Intel GPUs: install torch 2.8 or newer from "
            "requirements/xpu.txt, or the oneccl_bind_pt that belongs to your torch."
        )

    def memory(self) -> Memory:
        """Memory of the card; where the driver does not tell, what torch has not reserved."""
        try:
            free, total = torch.xpu.mem_get_info(self.torch_device)
        except RuntimeError:  # some integrated GPUs have no such query
            total = torch.xpu.get_device_properties(self.torch_device).total_memory
            free = total - torch.xpu.memory_reserved(self.torch_device)
        return Memory(total=total, free=free)

    def peak_memory(self) -> int:
        """Peak of torch's allocator on this card."""
        return torch.xpu.max_memory_reserved(self.torch_device)

    def reset_peak_memory(self) -> None:
        """Give cached memory back and start a new peak."""
        torch.xpu.empty_cache()
        torch.xpu.reset_peak_memory_stats(self.torch_device)

    def synchronize(self) -> None:
        """Wait for the card."""
        torch.xpu.synchronize(self.torch_device)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """See Device."""
        return fetch_by_event(tensor)
