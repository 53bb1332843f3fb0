"""fp32 matrix products on a CPU, by the faster of the two libraries that torch has.

``torch.mm`` asks MKL. For the products of a layer's forward pass and of its input's gradient oneDNN takes 0.90 to 0.95
of MKL's time on an AMD processor (family 25) and 1.1 to 1.6 of it on an Intel Xeon, so the maker decides: a measurement
would round differently in two runs of one job. A weight's gradient is MKL's everywhere, oneDNN is no faster there.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight.T``, [..., out] of [..., in]; ``F.linear`` where oneDNN is not the faster one."""
    if not _suits(x, weight_OI) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI)
    if not torch.is_grad_enabled():
        return _onednn(x, weight_OI.T)
    out = _Linear.apply(x, weight_OI)
    assert isinstance(out, Tensor)
    return out


def product(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, buffer: Tensor | None = None) -> Tensor:
    """``a @ b``, into ``out`` if given, or into ``buffer`` where that is cheaper than new memory; without autograd."""
    into = buffer if out is None else out
    if not _suits(a_MK, b_KN):
        return torch.mm(a_MK, b_KN) if into is None else torch.mm(a_MK, b_KN, out=into)
    found = _onednn(a_MK, b_KN)  # which always takes new memory
    return found if out is None else out.copy_(found)


def add_product_(to_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``to += a @ b``."""
    return to_MN.add_(_onednn(a_MK, b_KN)) if _suits(a_MK, b_KN) else to_MN.addmm_(a_MK, b_KN)


def _suits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0 and onednn_is_faster()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether the processor is AMD's and this build of torch has the (private) operator, with right results.

    The answer is kept, so it is that of real fp32 tensors on a CPU whatever default or mode its first caller works in.
    """
    try:
        maker = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        with _disable_current_modes():
            a, b = (torch.linspace(-1, 1, n, dtype=torch.float32, device="cpu").view(6, -1) for n in (24, 48))
            return maker and bool((_onednn(a.T, b) - torch.mm(a.T, b)).abs().max() < 1e-4)
    except (OSError, AttributeError, RuntimeError):
        return False


def _onednn(a: Tensor, b_KN: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b_KN.T, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _onednn(x, weight_OI.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        d_NO, x_NI = grads[0].reshape(-1, weight_OI.shape[0]), x.reshape(-1, weight_OI.shape[1])
        d_x = _onednn(d_NO, weight_OI).view(x.shape) if ctx.needs_input_grad[0] else None
        return d_x, torch.mm(d_NO.T, x_NI) if ctx.needs_input_grad[1] else None
