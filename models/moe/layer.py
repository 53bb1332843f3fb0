"""A feed-forward layer of experts in modality groups (MoMa, section 2.2)."""

import torch
from torch import Tensor, nn

from models.moe.exchange import Tokens
from models.moe.router import Router, Routing
from models.spec import ModelSpec


class ExpertStack(nn.Module):
    """The weights of one group's SwiGLU experts: gate and up [experts, 2 * ffn, dim], down [experts, dim, ffn]."""

    def __init__(self, experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * ffn_dim, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, ffn_dim))


class Experts(nn.ModuleDict):
    """The experts of a layer by group; apart, since their weights may lie on other ranks than the rest."""

    def __init__(self, spec: ModelSpec, control: Routing) -> None:
        sizes = zip(spec.expert_groups, spec.experts.groups, strict=True)
        super().__init__({name: ExpertStack(size, spec.dim, spec.ffn_dim) for name, size in sizes})
        self.control = control

    def forward(self, x_ND: Tensor, tokens: Tokens, chosen: tuple[Tensor, Tensor], gates_NE: Tensor) -> Tensor:
        """[tokens, dim] to the same shape; a token without an expert becomes 0."""
        stacks = [stack for stack in self.values() if isinstance(stack, ExpertStack)]
        weights = [(stack.gate_up, stack.down) for stack in stacks]
        return self.control.exchange.mix(x_ND, tokens, chosen, gates_NE, weights)


class ExpertLayer(nn.Module):
    """Tokens go to their modality's group, and inside it to the experts that choose them.

    Groups of one expert each need no router: the modality decides (``moe_1t1i``).
    """

    def __init__(self, spec: ModelSpec, layer: int, control: Routing) -> None:
        super().__init__()
        experts = spec.experts
        self.groups, self.causal, self.control = experts.groups, experts.causal, control
        self.router: Router | None = None
        if max(experts.groups) > 1:
            self.router = Router(
                spec.dim,
                experts.groups,
                active=experts.active,
                layer=layer,
                routing=experts.routing,
                noise=experts.noise,
                auxiliary=experts.causal == "auxiliary",
            )
            self.router.control = control
        self.experts = Experts(spec, control)

    def forward(self, x_BSE: Tensor, tokens: Tokens) -> Tensor:
        """[batch, sequence, dim] to the same shape."""
        x_ND = x_BSE.flatten(0, 1)
        if self.router is None:
            mine = tokens.allowed_NE
            chosen = self.control.exchange.choose(mine, tokens, lambda x: x, pooled=False)
            gates_NE = mine.to(torch.float32)
        else:
            chosen, gates_NE = self.router(x_ND, tokens, self.causal)
        return self.experts(x_ND, tokens, chosen, gates_NE).view_as(x_BSE)
