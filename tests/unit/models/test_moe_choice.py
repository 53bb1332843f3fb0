"""Expert choice, token choice, gates and noise against loops and known distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.moe.choice import capacity, expert_choice, gates, logistic_noise, token_choice


def by_loop(logits: Tensor, taken: int) -> Tensor:
    """Expert after expert, the best token that is left, the earlier of equals."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for expert in range(logits.shape[1]):
        ranked = sorted(range(logits.shape[0]), key=lambda i: (-logits[i, expert].item(), i))
        chosen[ranked[:taken], expert] = True
    return chosen


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    active=st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0, 9.0]),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_experts_take_their_best_tokens_and_earlier_ones_of_equals(
    tokens: int, experts: int, active: float, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (tokens, experts), generator=generator).float()
    chosen, lowest = expert_choice(logits, active)
    taken = min(tokens, math.ceil(active * tokens / experts))
    assert torch.equal(chosen, by_loop(logits, taken))
    if 0 < taken < tokens:
        assert torch.equal(lowest, logits.where(chosen, torch.inf).amin(0))
    else:
        assert lowest.eq(-torch.inf).all()


def test_capacity_is_exact_and_never_beyond_the_tokens() -> None:
    assert [capacity(n, 4, 1.0) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert capacity(30, 3, 0.1) == 1  # 0.1 * 30 is a little more than 3 in binary
    assert capacity(6, 2, 5.0) == 6


def test_a_logit_that_is_not_a_number_loses_and_shows_in_the_gate() -> None:
    logits = torch.tensor([[1.0], [torch.nan], [-3.0], [2.0]])
    chosen, _ = expert_choice(logits, 0.75)
    assert chosen[:, 0].tolist() == [True, False, True, True]
    everything, _ = expert_choice(logits, 1.0)
    assert gates(logits, everything).isnan().any(), "the loss must tell"
    assert not gates(logits, chosen).isnan().any()


def test_tokens_choose_by_score_plus_bias_within_their_group() -> None:
    logits = torch.tensor([[2.0, 1.0, 9.0, 9.0], [0.0, 0.0, 9.0, 0.0], [9.0, 9.0, 1.0, 2.0]])
    allowed = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    plain = token_choice(logits, torch.zeros(4), allowed, 1)
    assert plain.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    pushed = token_choice(logits, torch.tensor([0.0, 0.5, 0.5, 0.0]), allowed, 1)
    assert pushed.int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert token_choice(logits, torch.zeros(4), allowed, 2).sum(1).tolist() == [2, 2, 2]


def test_gates_are_sigmoids_of_the_chosen_and_even_ones_sum_to_one() -> None:
    logits, chosen = torch.randn(6, 3), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]])
    plain = gates(logits, chosen.bool())
    torch.testing.assert_close(plain, torch.sigmoid(logits) * chosen)
    even = gates(logits, chosen.bool(), 1.0)
    torch.testing.assert_close(even.sum(1), chosen.any(1).float())
    torch.testing.assert_close(gates(logits, chosen.bool(), 0.5) ** 2, plain * even)


def test_noise_is_logistic_and_a_function_of_key_and_place() -> None:
    index = torch.arange(20_000)
    noise = logistic_noise((3, 7, 1), index, 4)
    assert noise.dtype == torch.float32
    ordered = noise.flatten().double().sort().values
    expected = (torch.arange(ordered.numel()) + 0.5) / ordered.numel()
    assert (torch.sigmoid(ordered) - expected).abs().max() < 0.01, "Kolmogorov-Smirnov distance"
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.02)
    correlations = torch.corrcoef(torch.cat([noise.T, logistic_noise((3, 8, 1), index, 4).T]))
    assert (correlations - torch.eye(8)).abs().max() < 0.03
    some = torch.tensor([17, 3, 19_999])
    assert torch.equal(logistic_noise((3, 7, 1), some, 4), noise[some])
    assert not torch.equal(logistic_noise((3, 7, 1), some + 2**33, 4), noise[some])
