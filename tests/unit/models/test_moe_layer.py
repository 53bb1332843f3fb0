"""The layer of experts against a loop over tokens and experts in double precision; its edges; what it observes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused.grouped_reference import mix_experts_reference
from models.moe.choice import capacity
from models.moe.exchange import ABSENT, LocalExchange
from models.moe.layer import ExpertLayer
from models.moe.router import Routing
from models.spec import ExpertSpec
from tests.unit.models.moe import TWO, mixed_tokens, moe_model

MODALITIES = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1, ABSENT]])


def layer_of(groups: tuple[int, ...], dtype: torch.dtype = torch.float64, **experts: object) -> ExpertLayer:
    spec = replace(TWO, dim=16, ffn_dim=12, experts=ExpertSpec(groups=groups, **experts))  # pyright: ignore[reportArgumentType]
    layer = ExpertLayer(spec, 0, Routing()).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return layer


def run(layer: ExpertLayer, x: Tensor, modality: Tensor, pool_tokens: int = 10**6) -> Tensor:
    index = torch.arange(modality.numel()).view_as(modality)
    return layer(x, LocalExchange().tokens(modality, index, layer.groups, pool_tokens))


def by_definition(layer: ExpertLayer, x: Tensor, modality: Tensor, active: float = 1.0) -> Tensor:
    """MoMa, equation 1: inside each modality every expert takes the best-scored tokens of its share."""
    x_ND, kinds = x.flatten(0, 1), modality.flatten()
    chosen = torch.zeros(len(x_ND), sum(layer.groups), dtype=torch.bool)
    scores, start = torch.ones(len(x_ND), sum(layer.groups), dtype=x.dtype), 0
    if layer.router is not None:
        scores = torch.sigmoid(x_ND @ layer.router.weight.T)
    for group, size in enumerate(layer.groups):
        members = (kinds >= 0 if len(layer.groups) == 1 else kinds == group).nonzero()[:, 0].tolist()
        for expert in range(start, start + size):
            best = sorted(members, key=lambda i: (-scores[i, expert].item(), i))
            chosen[best[: capacity(len(members), size, active)], expert] = True
        start += size
    stacks = list(layer.experts.values())
    experts = [(a, b) for stack in stacks for a, b in zip(stack.gate_up, stack.down, strict=True)]  # pyright: ignore
    return mix_experts_reference(x_ND, chosen, scores, experts).view_as(x)


@pytest.mark.parametrize("groups", [(4, 4), (2, 3), (1, 1), (1, 4), (8,), (1,)])
@pytest.mark.parametrize("kinds", ["both", "first only", "second only", "none"])
def test_layer_and_its_gradients_equal_the_definition(groups: tuple[int, ...], kinds: str) -> None:
    modality = {
        "both": MODALITIES,
        "first only": torch.zeros(2, 9, dtype=torch.int64),
        "second only": torch.ones(2, 9, dtype=torch.int64),
        "none": torch.full((2, 9), ABSENT),
    }[kinds]
    layer = layer_of(groups)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64)
    ours, exact = run(layer, x, modality), by_definition(layer, x, modality)
    torch.testing.assert_close(ours, exact)
    inputs = [x, *layer.parameters()]
    mine = torch.autograd.grad(ours, inputs, d_out, materialize_grads=False)
    other = torch.autograd.grad(exact, inputs, d_out, allow_unused=True, materialize_grads=True)
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("active", [0.5, 2.0, 3.0])
def test_capacity_follows_the_tokens_of_the_group(active: float) -> None:
    layer = layer_of((4, 4), active=active)
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(run(layer, x, MODALITIES), by_definition(layer, x, MODALITIES, active))


def test_windows_that_form_pools_of_their_own_do_not_affect_each_other() -> None:
    layer = layer_of((4, 4))
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    apart = torch.cat([by_definition(layer, x[i : i + 1], MODALITIES[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(run(layer, x, MODALITIES, pool_tokens=9), apart)
    assert not torch.allclose(run(layer, x, MODALITIES), apart)


def test_equal_scores_everywhere_are_shared_by_position() -> None:
    layer = layer_of((4,))
    assert layer.router is not None
    layer.router.weight.data.zero_()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(run(layer, x, MODALITIES), by_definition(layer, x, MODALITIES))
    seen = layer.router.take_observed()
    assert seen.load.tolist() == [5.0] * 4, "17 tokens, a quarter each, rounded up"
    assert seen.covered.tolist() == [[12.0, 0.0, 5.0]], "all experts took the first five"


def test_observations_count_loads_and_coverage_by_group() -> None:
    layer = layer_of((4, 2))
    assert layer.router is not None
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    run(layer, x, MODALITIES)
    seen = layer.router.take_observed()
    assert seen.load.tolist() == [3, 3, 3, 3, 4, 4], "9 text tokens over 4 experts, 8 image tokens over 2"
    assert seen.covered.sum(1).tolist() == [9, 8]
    assert (seen.covered @ torch.tensor([0.0, 1.0, 2.0]))[1] == 8, "of two experts, nothing exceeds 2"
    assert layer.router.take_observed().load.sum() == 0


def test_noise_changes_the_choice_in_training_only_and_repeats_itself() -> None:
    layer = layer_of((4, 4), noise=True)
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.05
    first = run(layer, x, MODALITIES)
    assert torch.equal(first, run(layer, x, MODALITIES))
    layer.control.step = 1
    assert not torch.allclose(first, run(layer, x, MODALITIES))
    layer.eval()
    layer.control.way = "experts"
    torch.testing.assert_close(run(layer, x, MODALITIES), by_definition(layer, x, MODALITIES))


def test_token_choice_takes_the_best_and_balances_by_bias() -> None:
    layer = layer_of((4,), routing="token_choice")
    router = layer.router
    assert router is not None
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 400, 16, generator=generator, dtype=torch.float64) + 1.0  # a common part favours some experts
    kinds = torch.zeros(1, 400, dtype=torch.int64)
    loads = []
    for _ in range(300):
        run(layer, x, kinds)
        seen = router.take_observed()
        loads.append((seen.load.max() / seen.load.mean()).item())
        assert seen.covered.tolist() == [[0, 400, 0]]
        router.calibrate(seen, balance_rate=0.01)
    assert loads[0] > 1.5
    assert loads[-1] < 1.15


def test_the_router_stays_in_fp32_under_autocast_and_in_bf16_models() -> None:
    model = moe_model()
    tokens, positions = mixed_tokens(2, 40)
    seen: list[torch.dtype] = []
    router = model.routers()[0]
    router.register_forward_hook(lambda *call: seen.append(call[2][1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(tokens, tokens, positions)
    copy.deepcopy(model).bfloat16()(tokens, positions)
    assert seen == [torch.float32] * len(seen)
    assert len(seen) == 2


def test_post_norm_hides_the_gate_of_tokens_with_one_expert() -> None:
    """RMSNorm(g * FFN(x)) does not depend on g: such tokens teach the router nothing."""
    layer = layer_of((1, 4))
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    router = layer.router
    assert router is not None
    lone = (MODALITIES == 0)[..., None]  # the group of one expert
    for normalised, bound in ((False, 1.0), (True, 1e-6)):
        out = run(layer, x, MODALITIES)
        out = F.rms_norm(out, (16,), eps=0.0) if normalised else out
        (gradient,) = torch.autograd.grad((out * lone * x).sum(), [router.weight])
        assert (gradient.norm() < bound) == normalised
