"""A kernel with its grid and arguments: run on a device, or compiled for one that is not there."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# What Triton 3.9 does by default and 3.10 will not: products and sums in one instruction.
COMPILER = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """Everything that a launch consists of, so that what is compiled ahead of time is what runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options, **COMPILER)

    def compile(self) -> Any:
        """Compile for the active driver's target and return the binary; the tensors may be on the meta device."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options, **COMPILER)


def strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of a tensor's first three dims; a last one of width is 1."""
    assert x.ndim == 3 or x.stride(3) == 1, "the last dim must be dense"
    return x.stride()[0], x.stride()[1], x.stride()[2]


def padded(width: int) -> int:
    """The width of a tile that holds heads of ``width``: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


def tiled(rows: int, descriptors: bool, *tensors: Tensor) -> list[Tensor | TensorDescriptor]:
    """Tensors ``[batch, rows, heads, D]`` as descriptors of tiles ``[1, rows, 1, padded(D)]``, or as they are.

    Bulk copies take addresses and strides in multiples of 16 bytes; a tensor with others stays a pointer.
    """

    def fits(x: Tensor) -> bool:
        steps = [step * x.element_size() for step in x.stride()[:3]]
        return all(step % 16 == 0 for step in [*steps, 0 if x.is_meta else x.data_ptr()])

    return [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded(x.shape[3])])
        if descriptors and fits(x)
        else x
        for x in tensors
    ]


def precision(dtype: torch.dtype) -> str:
    """fp32 products in fp32, or in TF32 if the program has asked torch for that."""
    tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
