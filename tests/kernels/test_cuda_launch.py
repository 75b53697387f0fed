"""How arguments of CUDA kernels lie in memory; no card is needed."""

from __future__ import annotations

import ctypes

import torch

from autotp_serving.kernels.cuda.nvrtc import Long, _Packing


def test_arguments_lie_where_the_pointers_say():
    tensor = torch.empty(4)
    table = bytes(range(16))
    arguments = (7, tensor, None, 0.5, Long(2**40), table, -1)
    packing = _Packing(arguments)
    for number in (7, 8):  # the memory is used again
        packing.write((number, *arguments[1:]))
        read = [
            kind.from_address(pointer)
            for kind, pointer in zip(
                (
                    *(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float),
                    *(ctypes.c_int64, ctypes.c_char * 16, ctypes.c_int32),
                ),
                packing.pointers,
                strict=True,
            )
        ]
        assert read[5].raw == table
        values = [item.value for item in (*read[:5], read[6])]
        assert values == [number, tensor.data_ptr(), None, 0.5, 2**40, -1]
