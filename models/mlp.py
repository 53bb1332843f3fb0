"""The gated feed-forward layer SwiGLU (arXiv:2002.05202, equation 6)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import Linear
from models.spec import ModelSpec


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = Linear(spec.dim, spec.ffn_dim, bias=False)
        self.up = Linear(spec.dim, spec.ffn_dim, bias=False)
        self.down = Linear(spec.ffn_dim, spec.dim, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        """[batch, sequence, dim] to the same shape."""
        return self.down(F.silu(self.gate(x_BSE)) * self.up(x_BSE))
