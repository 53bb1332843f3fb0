"""Repair of Triton 3.9's interpreter, for tests: bf16 arithmetic, rounding to nearest, and adding through descriptors.

The interpreter keeps bf16 as raw uint16 and multiplies the bit patterns; its casts to bf16 truncate; it lacks the
descriptors' reduction. With :func:`repair` a bf16 operand is widened to fp32 before any arithmetic, and rounded to the
nearest, ties to even, where it becomes bf16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle: Any = interpreter.TensorHandle
_Builder: Any = interpreter.InterpreterBuilder


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, _Handle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> Any:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return _Handle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest), tl.bfloat16)


def _cast(plain: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if _is_bf16(source) else _rounded(np.asarray(source.data, dtype=np.float32))
        source = _widened(source)
        return source if source.dtype.scalar == target.scalar else plain(self, source, target)

    return cast


def _arithmetic(plain: Callable[..., Any], operands: int) -> Callable[..., Any]:
    def operate(self: Any, *arguments: Any) -> Any:
        narrow = any(_is_bf16(x) for x in arguments[:operands])
        result = plain(self, *map(_widened, arguments[:operands]), *arguments[operands:])
        return _rounded(result.data) if narrow and result.dtype.scalar == tl.float32 else result

    return operate


def _add_through_descriptor(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> Any:
    pointers, mask = descriptor.materialize_pointers(indices)
    pointers = _Handle(pointers.data, descriptor.base.dtype)
    value = _Handle(np.ascontiguousarray(value.data), value.dtype)
    add, relaxed = interpreter._ir.ATOMIC_OP.FADD, interpreter._ir.MEM_SEMANTIC.RELAXED
    return self.create_atomic_rmw(add, pointers, value, mask, relaxed, None)


def repair() -> None:
    """Mend the interpreter of this process."""
    dot, cast = _Builder.create_dot, _cast(_Builder.cast_impl)
    _Builder.create_dot = lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest)
    _Builder.cast_impl = cast
    _Builder.create_fp_to_fp = lambda self, source, target, mode: cast(self, source, target)
    for name, operands in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3)):
        setattr(_Builder, name, _arithmetic(getattr(_Builder, name), operands))
    _Builder.create_descriptor_reduce = _add_through_descriptor
