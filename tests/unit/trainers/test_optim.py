import pytest
import torch
from torch import nn

from conf.schema import TrainerConfig
from trainers.optim import build_optimizer, set_learning_rate


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_matrices_decay_and_gains_do_not() -> None:
    model = _Model()
    optimizer = build_optimizer(model, TrainerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(model.embed.weight): 0.3, id(model.norm.weight): 0.0}


def test_step_is_that_of_plain_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    twin = nn.Linear(3, 3, bias=False)
    twin.load_state_dict(model.state_dict())
    trainer = TrainerConfig(lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9)
    ours = build_optimizer(model, trainer)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, betas=(0.8, 0.9), weight_decay=0.2, foreach=False)
    set_learning_rate(ours, 0.05)
    for seed in range(3):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        for module, optimizer in ((model, ours), (twin, plain)):
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.detach().numpy() == pytest.approx(twin.weight.detach().numpy(), abs=1e-6)
