import math
from typing import Any

import pytest
import torch

from conf.errors import ConfigError, DataError
from inference.params import SamplingParams
from inference.sampler import Sampler, filtered

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, -3.0])


def draws(params: SamplingParams, n: int) -> list[int]:
    sampler = Sampler(params)
    counts = [0] * LOGITS.numel()
    for index in range(n):
        counts[sampler.choose(LOGITS, index)] += 1
    return counts


def chi_square(counts: list[int], probabilities: torch.Tensor) -> float:
    total = sum(counts)
    pairs = zip(counts, probabilities.tolist(), strict=True)
    return sum((count - total * p) ** 2 / (total * p) for count, p in pairs if p > 0)


def test_temperature_zero_is_the_most_probable_token():
    assert {Sampler(SamplingParams(temperature=0.0)).choose(LOGITS, i) for i in range(20)} == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float):
    counts = draws(SamplingParams(temperature=temperature, seed=3), 5000)
    # 5 degrees of freedom: above 20.5 once in a thousand seeds; the seed is fixed.
    assert chi_square(counts, (LOGITS / temperature).softmax(0)) < 20.5


def test_top_k_keeps_the_k_most_probable_in_proportion():
    counts = draws(SamplingParams(top_k=3, seed=1), 3000)
    expected = LOGITS.softmax(0)
    expected[[0, 2, 5]] = 0
    assert (counts[0], counts[2], counts[5]) == (0, 0, 0)
    assert chi_square(counts, expected / expected.sum()) < 13.8


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, [1]), (0.5, [1, 3]), (0.8, [1, 3, 4]), (0.999, [1, 3, 4, 0, 2, 5])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]):
    # sums of the sorted probabilities: 0.480 0.770 0.901 0.973 0.997 1
    _, ids = filtered(LOGITS, SamplingParams(top_p=top_p))
    assert ids is not None
    assert ids.tolist() == kept


def test_top_p_counts_within_top_k():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the two kept the first has 4/7 = 0.571
    _, ids = filtered(logits, SamplingParams(top_k=2, top_p=0.55))
    assert ids is not None
    assert ids.tolist() == [0]


def test_a_seed_fixes_each_token_by_its_index():
    first, second = (Sampler(SamplingParams(seed=7)) for _ in range(2))
    forward = [first.choose(LOGITS, i) for i in range(50)]
    backward = [second.choose(LOGITS, i) for i in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [Sampler(SamplingParams(seed=8)).choose(LOGITS, i) for i in range(50)]


def test_without_a_seed_requests_differ():
    numbers = {Sampler(SamplingParams()).uniform(0) for _ in range(10)}
    assert len(numbers) == 10


@pytest.mark.parametrize("seed", [-1, 0, 2**63, -(2**63)])
def test_any_integer_is_a_seed(seed: int):
    assert 0 <= Sampler(SamplingParams(seed=seed)).uniform(3) < 1


def test_extreme_values():
    assert Sampler(SamplingParams(temperature=1e-300, seed=0)).choose(LOGITS, 0) == 1
    assert Sampler(SamplingParams(seed=0)).choose(torch.tensor([-1e30, 0.0, -1e30]), 0) == 1
    assert Sampler(SamplingParams(seed=0, top_k=1000)).choose(LOGITS, 0) in range(6)
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="finite"):
            Sampler(SamplingParams()).choose(torch.tensor([0.0, bad]), 0)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
    ],
)
def test_values_out_of_range(params: dict[str, Any]):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**params)
    assert error.value.field == next(iter(params))


def test_min_p_keeps_what_is_probable_beside_the_most_probable():
    # probabilities beside the largest: 0.15 1 0.05 0.61 0.27 0.007
    for least, kept in ((1.0, [1]), (0.5, [1, 3]), (0.1, [1, 3, 4, 0]), (0.001, [1, 3, 4, 0, 2, 5])):
        _, ids = filtered(LOGITS, SamplingParams(min_p=least))
        assert ids is not None
        assert ids.tolist() == kept


def test_a_large_vocabulary_is_filtered_as_if_it_were_sorted():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 4
    order = logits.softmax(0, dtype=torch.float64).sort(descending=True)
    for params in (SamplingParams(top_p=0.5), SamplingParams(top_p=0.999999), SamplingParams(min_p=1e-3)):
        probabilities, ids = filtered(logits, params)
        assert ids is not None
        before = order.values.cumsum(0) - order.values
        kept = (
            int((before < params.top_p).sum())
            if params.top_p < 1
            else int((order.values >= 1e-3 * order.values[0]).sum())
        )
        assert ids.tolist() == order.indices[:kept].tolist()
        torch.testing.assert_close(probabilities, order.values[:kept])


def test_bias_and_penalties_move_the_logits_as_defined():
    params = SamplingParams(
        temperature=0.0, logit_bias={2: 5.0}, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
    )
    sampler = Sampler(params, prompt=[4, 5])
    for token in (1, 1, 3):
        sampler.count(token)
    expected = [0.1, 2.0 / 2 - 0.5 - 2 * 0.25, -1.0 + 5.0, 1.5 / 2 - 0.5 - 0.25, 0.7 / 2, -3.0 * 2]
    torch.testing.assert_close(sampler._adjusted(LOGITS), torch.tensor(expected))
    assert sampler.choose(LOGITS, 0) == 2


def test_forbidden_tokens_are_never_chosen():
    allowed = torch.tensor([True, False, True, False, False, False])
    for temperature in (0.0, 5.0):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
        assert {sampler.choose(LOGITS, index, allowed) for index in range(50)} <= {0, 2}
