"""Triton's kernels on a CPU, by its interpreter, where there is no card."""

from __future__ import annotations

import os

import numpy as np
import torch


def choose_device() -> torch.device:
    """A card if there is one; else the CPU, with the interpreter switched on.

    To be called before a module with kernels is imported: Triton reads the switch there.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    os.environ["TRITON_INTERPRET"] = "1"
    mend_interpreter()
    return torch.device("cpu")


def mend_interpreter() -> None:
    """Make up for two gaps of Triton 3.6's interpreter.

    It makes an index of an array of one number, which numpy refuses since 2.4, and it multiplies
    the bits of bf16 numbers as whole numbers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, multiply = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

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

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpreterBuilder.create_dot = multiply_widened
