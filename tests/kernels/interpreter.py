"""Triton's kernels on a CPU, by its interpreter, where there is no card."""

from __future__ import annotations

import numpy as np
import torch


def choose_device() -> torch.device:
    """A card if there is one; else the CPU and the interpreter, which `tests` switches on."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    mend_interpreter()
    return torch.device("cpu")


def mend_interpreter() -> None:
    """Make up for three gaps of Triton 3.6's interpreter.

    It makes an index of an array of one number, which numpy refuses since 2.4, it multiplies the
    bits of bf16 numbers as whole numbers, and it makes those bits from whole numbers as they are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, multiply, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_and_mend(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widen(handle: object) -> object:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def multiply_widened(self: object, a: object, b: object, *rest: object) -> object:
        return multiply(self, widen(a), widen(b), *rest)

    def cast_by_float(self: object, source: object, target: object) -> object:
        is_whole = source.dtype.scalar.is_int() and target.scalar == tl.bfloat16
        if not is_whole:
            return cast(self, source, target)
        wide = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, wide, target)

    interpreter._patch_lang_tensor = patch_and_mend
    builder.create_dot = multiply_widened
    builder.cast_impl = cast_by_float
