"""Rotary position embeddings (RoFormer, arXiv:2104.09864, section 3.2.2) in the half-rotation layout.

Feature ``i`` is paired with feature ``i + head_dim / 2``, the layout of Hugging Face checkpoints, so that weights map
between the two without a permutation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused.rows import rotate
from models.spec import RopeSpec


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of a batch of positions, each [batch, sequence, 1, head_dim / 2], fp32.

    An object and not two tensors, so that wrappers which cast the floating-point inputs of a block to a lower
    precision leave the angles alone.
    """

    cos: Tensor
    sin: Tensor

    def apply(self, x_BSHD: Tensor) -> Tensor:
        """Turn every head of ``x``; computed in fp32 at least, returned in the dtype of ``x``."""
        return rotate(x_BSHD, self.cos, self.sin)


def inverse_frequencies(head_dim: int, spec: RopeSpec, device: torch.device | None = None) -> Tensor:
    """Radians per position of every feature pair, [head_dim / 2], fp32.

    ``linear`` divides all of them by the factor (arXiv:2306.15595); ``llama3`` divides the slow ones, keeps the fast
    ones and blends between (Llama 3, arXiv:2407.21783, section 3.4; constants of the released configs).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "llama3":
        turns = spec.original_context * frequencies / (2 * math.pi)  # full turns within the original context
        blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / spec.factor + blend * frequencies
    return frequencies


def turn(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """The rotation at each position as complex numbers, [T, head_dim / 2], for features whose pairs are neighbours."""
    angles = positions_T[:, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotation(positions_BS: Tensor, head_dim: int, spec: RopeSpec) -> Rotation:
    """The rotation of integer positions, [batch, sequence]."""
    frequencies = inverse_frequencies(head_dim, spec, positions_BS.device)
    angles = (positions_BS[..., None].float() * frequencies)[:, :, None, :]
    return Rotation(angles.cos(), angles.sin())
