"""A step's arrays from the host to the device, by one copy that nobody waits for. Every rank."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

NUM_STAGES = 3
"""Buffers of pinned memory in turns: one more than the most steps in flight."""

ALIGNMENT = 16
"""Bytes: Triton compiles a kernel anew for addresses that are no multiple of it."""
MAX_ARRAYS = 8


def align(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Stage:
    """Pinned memory on the host, and one buffer on the device; on a CPU arrays stay where they are.

    Tensors of steps alike in size lie at the same addresses, once `reserve` was called for the
    largest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staged = torch.empty(0, dtype=torch.uint8, device=device)
        self._stages: deque[tuple[Tensor, torch.Event]] = deque()

    def reserve(self, num_bytes: int) -> None:
        """Make the device's buffer so large, and as much more as `copy` leaves between arrays."""
        num_bytes += MAX_ARRAYS * ALIGNMENT
        self._staged = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def copy(self, arrays: list[np.ndarray]) -> list[Tensor]:
        """The arrays, at most MAX_ARRAYS of int64 or int32, as tensors on the device."""
        if self._staged.is_cpu:
            return [torch.from_numpy(array) for array in arrays]
        num_bytes = sum(align(array.nbytes) for array in arrays)
        stage = self._take_stage(num_bytes)
        if len(self._staged) < num_bytes:
            self.reserve(2 * num_bytes)
        host = stage.numpy()
        tensors = []
        start = 0
        for array in arrays:
            stop = start + array.nbytes
            host[start:stop] = array.view(np.uint8)
            dtype = torch.int64 if array.itemsize == 8 else torch.int32
            tensors.append(self._staged[start:stop].view(dtype))
            start += align(array.nbytes)
        self._staged[:num_bytes].copy_(stage[:num_bytes], non_blocking=True)
        copied = torch.Event(self._device)
        copied.record()
        self._stages.append((stage, copied))
        return tensors

    def _take_stage(self, num_bytes: int) -> Tensor:
        """Pinned memory that no copy reads any more."""
        if len(self._stages) < NUM_STAGES:
            return torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        stage, copied = self._stages.popleft()
        copied.synchronize()
        if len(stage) < num_bytes:
            return torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        return stage

    def send(self, numbers: np.ndarray) -> Tensor:
        """A few more indices, [num_lists, length] int64, on the device; rarely needed."""
        tensor = torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
        if self._staged.is_cpu:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
