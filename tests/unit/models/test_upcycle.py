"""Upcycling preserves the function; annealing ends at the model's own routing; auxiliary routers change nothing."""

import pytest
import torch

from models.decoder import Decoder
from models.moe.upcycle import add_auxiliary, anneal, expert_routers, upcycle
from models.spec import ExpertSpec
from tests.unit.models.moe import mixed_tokens, moe_model


def logits(model: Decoder) -> torch.Tensor:
    tokens, positions = mixed_tokens(2, 40, seed=3)
    with torch.no_grad():
        return model(tokens, positions)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("groups", [(1, 1), (), (1,)])
@pytest.mark.parametrize("training", [True, False])
def test_the_function_is_the_same_at_the_switch(norm: str, groups: tuple[int, ...], training: bool) -> None:
    seed = moe_model(groups=groups, norm=norm).train(training)
    target = ExpertSpec(groups=(4, 3) if len(groups) != 1 else (4,), noise=True)
    grown = upcycle(seed, target, 5).train(training)
    assert grown.spec.experts == target
    torch.testing.assert_close(logits(grown), logits(seed), rtol=1e-5, atol=1e-5)


def test_annealing_ends_at_the_models_own_routing() -> None:
    grown = upcycle(moe_model(groups=(1, 1)), ExpertSpec(groups=(4, 4)), 5)
    middle = [anneal(grown, 0.5), [(r.active, r.evenness) for r in expert_routers(grown)]][1]
    assert middle == [(2.5, 0.5)] * 3
    anneal(grown, 1.0)
    again = Decoder(grown.spec)
    again.load_state_dict(grown.state_dict())
    assert torch.equal(logits(grown), logits(again))


def test_copies_are_not_shared() -> None:
    grown = upcycle(moe_model(groups=()), ExpertSpec(groups=(2, 2)), 5)
    stack = grown.get_parameter("layers.0.mlp.experts.text.gate_up")
    assert torch.equal(stack[0], stack[1])
    stack.data[0].zero_()
    assert stack[1].any()


def test_auxiliary_routers_leave_the_training_forward_pass_alone() -> None:
    model = moe_model(depth=0.5)
    assert torch.equal(logits(add_auxiliary(model, 1)), logits(model))
