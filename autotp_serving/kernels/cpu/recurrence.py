"""Short convolutions and recurrences by csrc/recurrence.cpp, for AVX-512 and AVX2. Ranks on CPU.

What a kernel does not take (sizes that are no multiple of 16, say) the reference does.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from autotp_serving.devices.build import BuildError, best_isa, build_library, isa_flags
from autotp_serving.kernels.reference.recurrence import Recurrence, ReferenceRecurrence, Spans

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "recurrence.cpp"

LANES, MAX_ROWS, MAX_TAPS = 16, 256, 8
"""As in csrc/recurrence.cpp."""


class SpanPointers(ctypes.Structure):
    """AutotpSpans of csrc/recurrence.cpp."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("lens", ctypes.c_void_p),
        ("is_new", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )

    @staticmethod
    def of(spans: Spans) -> SpanPointers:
        """Where a step's spans, which must outlive the call, lie."""
        tensors = (spans.rows, spans.starts, spans.lens, spans.is_new)
        addresses = (tensor.data_ptr() for tensor in tensors)
        return SpanPointers(*addresses, len(spans.host_lens), torch.get_num_threads())


class CpuRecurrence(ReferenceRecurrence):
    """See Recurrence."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._convolve = library.autotp_convolve
        self._convolve.argtypes = (*(pointer,) * 6, *(number,) * 3)
        self._gated_delta = library.autotp_gated_delta
        self._gated_delta.argtypes = (*(pointer,) * 8, *(number,) * 5)
        self._selective_scan = library.autotp_selective_scan
        self._selective_scan.argtypes = (*(pointer,) * 8, *(number,) * 4)
        for function in (self._convolve, self._gated_delta, self._selective_scan):
            function.restype = None

    def convolve(
        self, spans: Spans, inputs: Tensor, taps: Tensor, bias: Tensor | None, pool: Tensor
    ) -> Tensor:
        """See Recurrence."""
        num_taps, num_channels = taps.shape
        if num_taps > MAX_TAPS or inputs.dtype not in (torch.float32, torch.bfloat16):
            return super().convolve(spans, inputs, taps, bias, pool)
        inputs = inputs.contiguous()
        out = torch.empty(inputs.shape, dtype=torch.float32)
        self._convolve(
            ctypes.byref(SpanPointers.of(spans)),
            inputs.data_ptr(),
            taps.data_ptr(),
            None if bias is None else bias.data_ptr(),
            pool.data_ptr(),
            out.data_ptr(),
            num_channels,
            num_taps,
            inputs.dtype == torch.bfloat16,
        )
        return out

    def gated_delta(
        self,
        spans: Spans,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """See Recurrence."""
        _, num_heads, value_dim = value.shape
        _, num_key_heads, key_dim = key.shape
        if key_dim > MAX_ROWS or value_dim % LANES:
            return super().gated_delta(spans, query, key, value, decay, beta, pool)
        given = [one.contiguous() for one in (query, key, value, decay, beta)]
        out = torch.empty_like(given[2])
        self._gated_delta(
            ctypes.byref(SpanPointers.of(spans)),
            *(tensor.data_ptr() for tensor in (*given, pool, out)),
            num_heads,
            num_key_heads,
            key_dim,
            value_dim,
            decay.dim() == 3,
        )
        return out

    def selective_scan(
        self,
        spans: Spans,
        inputs: Tensor,
        decay: Tensor,
        entry: Tensor,
        exit: Tensor,
        groups: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """See Recurrence."""
        _, num_heads, head_dim = inputs.shape
        _, num_groups, state_size = entry.shape
        if state_size % LANES:
            return super().selective_scan(spans, inputs, decay, entry, exit, groups, pool)
        given = [one.contiguous() for one in (inputs, decay, entry, exit, groups)]
        out = torch.empty_like(given[0])
        self._selective_scan(
            ctypes.byref(SpanPointers.of(spans)),
            *(tensor.data_ptr() for tensor in (*given, pool, out)),
            num_heads,
            num_groups,
            head_dim,
            state_size,
        )
        return out


@functools.cache
def load_recurrence(isa: str | None = None) -> Recurrence:
    """The kernels for the best instruction set here (or the named one), or the reference.

    A line in the log says where there are none.
    """
    try:
        flags = isa_flags(isa or best_isa())
        return CpuRecurrence(ctypes.CDLL(str(build_library("recurrence", SOURCE, flags))))
    except (BuildError, OSError) as error:
        logger.warning("Layers that keep states run in torch, slowly: %s", error)
        return ReferenceRecurrence()
