"""Linear layers for a CPU that runs a few rows at a time, where reading the weights is what costs.

``fp32`` and ``bf16`` keep the model's arithmetic. oneDNN's own layout of an fp32 weight saves re-arranging it at every
call, which makes the second and third row almost free. Where oneDNN is the faster library (``fused.products``) that is
the only copy of a weight, for any number of rows. Elsewhere it is a second copy for two to ``PACKED_ROWS`` rows: one
row is a matrix-vector product on the plain weight, and with more rows both are equal.

``int8`` and ``int4`` store weights only (one scale a row; or a scale and a zero for every ``GROUP`` weights) and
multiply while they read the weight, 4 bits and more than very few rows with bf16 inputs; many rows at once are better
off with the weight restored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import ConfigError
from fused.products import onednn_is_faster
from inference import int8_rows

PACKED_ROWS = 48
QUANTISED_ROWS = 12  # above it, restoring the weight is cheaper than the row-by-row kernels
GROUP = 32


class PlainLinear:
    """``x W^T + b`` with the weight in one layout, or two."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, pack: bool) -> None:
        self._bias = bias_O
        self._packed = _pack(weight_OI, bias_O) if pack else None
        self._plain: Tensor | None = weight_OI.t()
        if weight_OI.dtype == torch.float32 and onednn_is_faster():  # without packing too
            self._packed, self._plain = weight_OI if self._packed is None else self._packed, None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[rows, in] to [rows, out]."""
        if self._plain is None or (self._packed is not None and 1 < x_TI.shape[0] <= PACKED_ROWS):
            assert self._packed is not None
            return _packed_linear(x_TI, self._packed, self._bias)
        if self._bias is None:
            return torch.mm(x_TI, self._plain)  # what F.linear does, by a shorter way
        return torch.addmm(self._bias, x_TI, self._plain)


class Int8Linear:
    """Weights as 8-bit integers with one scale an output."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._short_scale = (weight_OI.abs().amax(1).clamp_min(1e-12) / 127).bfloat16()  # as torch's operator wants it
        self._scale, self._bias = self._short_scale.float(), bias_O
        self._weight = (weight_OI / self._scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        int8_rows.warm_up()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[rows, in] to [rows, out]."""
        if x_TI.shape[0] > QUANTISED_ROWS:
            return F.linear(x_TI, self._weight.to(x_TI.dtype) * self._scale.to(x_TI.dtype)[:, None], self._bias)
        if x_TI.dtype == torch.float32 and int8_rows.suits(x_TI.shape[0]):
            out = int8_rows.product(x_TI, self._weight, self._scale)
        else:
            out = torch.ops.aten._weight_int8pack_mm(x_TI.bfloat16(), self._weight, self._short_scale).to(x_TI.dtype)
        return out if self._bias is None else out + self._bias


class Int4Linear:
    """Weights as 4-bit integers with a scale and a zero for every ``GROUP`` inputs of an output."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        outputs, inputs = weight_OI.shape
        if inputs % GROUP:
            raise ConfigError("dtype", "int4", f"layer widths must be multiples of {GROUP}", "use int8")
        groups = weight_OI.reshape(outputs, -1, GROUP)
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()  # the value that the kernel gives to the integer 8
        codes = (groups - zero.float()[..., None]) / scale.float()[..., None] + 8
        codes = codes.round().clamp(0, 15).to(torch.int32).reshape(outputs, inputs)
        self._scales_zeros = torch.stack((scale, zero), 2).transpose(0, 1).contiguous()  # [groups, out, 2]
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._codes, self._bias = codes.to(torch.uint8), bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[rows, in] to [rows, out]."""
        if x_TI.shape[0] > QUANTISED_ROWS:
            return F.linear(x_TI, self._restored(x_TI.dtype), self._bias)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI.bfloat16(), self._packed, GROUP, self._scales_zeros)
        return out.to(x_TI.dtype) if self._bias is None else out.to(x_TI.dtype) + self._bias

    def _restored(self, dtype: torch.dtype) -> Tensor:
        scale, zero = (part.T[..., None].to(dtype) for part in self._scales_zeros.unbind(2))
        outputs, inputs = self._codes.shape
        groups = self._codes.view(outputs, -1, GROUP).to(dtype)
        return ((groups - 8) * scale + zero).view(outputs, inputs)


Linear = PlainLinear | Int8Linear | Int4Linear


def linear(weight_OI: Tensor, bias_O: Tensor | None, form: str, pack: bool) -> Linear:
    """A layer in one of ``conf.schema.FORMS``."""
    if form == "int8":
        return Int8Linear(weight_OI, bias_O)
    if form == "int4":
        return Int4Linear(weight_OI, bias_O)
    return PlainLinear(weight_OI, bias_O, pack and weight_OI.dtype == torch.float32)


def _pack(weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """The weight in oneDNN's layout; None where this build of torch cannot, or does it wrongly."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 8)
        probe = torch.linspace(-1.0, 1.0, 2 * weight_OI.shape[1]).view(2, -1)
        expected = F.linear(probe, weight_OI, bias_O)
        error = (_packed_linear(probe, packed, bias_O) - expected).abs().max()
        return packed if error <= 1e-4 * expected.abs().max() + 1e-6 else None
    except (AttributeError, RuntimeError):  # private operators: another build may lack them
        return None


def _packed_linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], "")
