"""One CUDA card per rank. Every rank of a CUDA server."""

from __future__ import annotations

from collections.abc import Callable

import torch

from autotp_serving.devices.base import DeviceError, Memory, fetch_by_event


class CudaDevice:
    """The card with this rank's number on its host."""

    kind = "cuda"
    is_host = False
    backend = "nccl"
    max_in_flight = 2

    def __init__(self, local_rank: int) -> None:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise DeviceError(
                f"rank {local_rank} of this host has no CUDA card: {count} visible. "
                "Start fewer ranks, or check nvidia-smi and CUDA_VISIBLE_DEVICES."
            )
        self.torch_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.torch_device)
        # cuDNN's attention plans anew for every context length, 30 ms and more in each step.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @staticmethod
    def is_present() -> bool:
        """True when torch sees a CUDA card."""
        return torch.cuda.is_available()

    def memory(self) -> Memory:
        """Memory of the card, other processes' share counted as taken."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return Memory(total=total, free=free)

    def peak_memory(self) -> int:
        """Peak of torch's allocator on this card."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    def reset_peak_memory(self) -> None:
        """Give cached memory back and start a new peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def synchronize(self) -> None:
        """Wait for the card."""
        torch.cuda.synchronize(self.torch_device)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """See Device."""
        return fetch_by_event(tensor)
