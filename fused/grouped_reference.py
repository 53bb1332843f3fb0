"""The readable twin of ``fused.grouped``: from the definition, differentiated by autograd, in any precision."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_swiglu(x_RD: Tensor, gate_up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """One expert's feed-forward (arXiv:2002.05202, equation 6); gate and up are the halves of the first weight."""
    gate, up = F.linear(x_RD, gate_up_HD).chunk(2, 1)
    return F.linear(F.silu(gate) * up, down_DH)


def mix_experts_reference(
    x_ND: Tensor, chosen_NE: Tensor, gates_NE: Tensor, experts: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """``y_i = sum over experts j that chose token i of gate_ij * FFN_j(x_i)`` (arXiv:2407.21770, equation 1).

    Every expert computes every token and a mask keeps what was chosen; ``experts`` lists (gate and up, down) of each.
    """
    outputs = [expert_swiglu(x_ND, gate_up, down) for gate_up, down in experts]
    weights = gates_NE * chosen_NE
    return torch.stack([weights[:, e, None] * out for e, out in enumerate(outputs)]).sum(0)
