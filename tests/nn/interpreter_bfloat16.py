"""The hardware's bfloat16 for Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the casts and products of Triton's interpreter.

    The interpreter stores bfloat16 as 16-bit integers. Its casts truncate, and its products
    multiply the bits as integers. After this call, casts round to nearest with ties to even, and
    products are computed in float32, in which a product of two bfloat16 is exact.
    """
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_rounding(
        self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype
    ) -> TensorHandle:
        if dtype.scalar != tl.bfloat16:
            return cast(self, _widened(source), dtype)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    def dot_in_float32(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *options: object
    ) -> TensorHandle:
        return dot(self, _widened(a), _widened(b), *options)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_rounding)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_in_float32)


def _widened(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 tensor as float32; other tensors as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.bfloat16).float()
    return TensorHandle(values.numpy(), tl.float32)
