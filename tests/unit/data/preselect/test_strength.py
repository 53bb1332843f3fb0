"""Predictive strength against its definition, Kendall's tau, its controls, and input that it must refuse."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from conf.errors import ConfigError, DataError
from data.preselect.pairs import positives_and_negatives
from data.preselect.strength import (
    Array,
    Rule,
    model_pairs,
    pair_agreement,
    strength,
    strengths_of_rankings,
)


def brute_force(
    losses: Array, abilities: Array, ties: float = 0.5, margin: float = 0.0, errors: Array | None = None
) -> list[float]:
    """Equation (1) of the paper, pair by pair, document by document."""
    result = []
    for document in range(losses.shape[1]):
        won = pairs = 0.0
        for i, j in itertools.permutations(range(len(abilities)), 2):
            if not abilities[i] < abilities[j]:
                continue
            gap = losses[i, document] - losses[j, document]
            bound = 0.0
            if errors is not None:
                bound = margin * (errors[i, document] ** 2 + errors[j, document] ** 2) ** 0.5
            won += 1.0 if gap > bound else 0.0 if gap < -bound else ties
            pairs += 1
        result.append(won / pairs)
    return result


def sample(seed: int, models: int, documents: int, levels: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    losses = random.normal(size=(models, documents))
    losses = np.round(losses * levels) / levels if levels else losses
    return losses, random.permutation(models).astype(float)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999),
    st.integers(2, 8),
    st.integers(1, 12),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equals_the_definition(seed: int, models: int, documents: int, levels: int, ties: float) -> None:
    losses, abilities = sample(seed, models, documents, levels)
    found = strength(losses, abilities, Rule(ties=ties))
    np.testing.assert_allclose(found, brute_force(losses, abilities, ties), atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()


def test_margin_counts_standard_errors() -> None:
    losses, abilities = sample(3, 6, 200)
    errors = np.random.default_rng(4).uniform(0.1, 1.0, losses.shape)
    found = strength(losses, abilities, Rule(margin=1.5), errors=errors)
    np.testing.assert_allclose(found, brute_force(losses, abilities, 0.5, 1.5, errors), atol=1e-12)
    wide = strength(losses, abilities, Rule(margin=1e9), errors=errors)
    np.testing.assert_array_equal(wide, 0.5)


@pytest.mark.parametrize("models", [2, 3, 6, 9])
def test_is_kendalls_tau(models: int) -> None:
    losses, abilities = sample(models, models, 50)
    tau = [kendalltau(-losses[:, d], abilities)[0] for d in range(50)]
    np.testing.assert_allclose(strength(losses, abilities), (np.array(tau) + 1) / 2, atol=1e-12)


def test_only_the_order_matters_and_the_order_of_the_models_does_not() -> None:
    losses, abilities = sample(1, 6, 100)
    base = strength(losses, abilities)
    np.testing.assert_array_equal(strength(np.exp(losses) * 7, abilities * 3 - 1), base)
    turn = np.random.default_rng(0).permutation(6)
    np.testing.assert_allclose(strength(losses[turn], abilities[turn]), base, atol=1e-15)
    np.testing.assert_allclose(strength(losses, -abilities), 1 - base, atol=1e-15)


def test_weight_zero_leaves_a_model_out_and_weights_multiply() -> None:
    losses, abilities = sample(5, 4, 60)
    without = strength(losses, abilities, weights=np.array([1.0, 0.0, 1.0, 1.0]))
    kept = [0, 2, 3]
    np.testing.assert_allclose(without, strength(losses[kept], abilities[kept]), atol=1e-15)
    doubled = strength(losses, abilities, weights=np.array([2.0, 1.0, 1.0, 1.0]))
    pairs, weights = model_pairs(abilities, np.array([2.0, 1.0, 1.0, 1.0]))
    won = [[losses[i, d] > losses[j, d] for i, j in pairs] for d in range(60)]
    np.testing.assert_allclose(doubled, (np.array(won) @ weights) / weights.sum(), atol=1e-15)


def test_normalised_by_domain() -> None:
    losses, abilities = sample(6, 5, 300)
    domains = np.repeat(["a", "b", "c"], 100)
    losses[:, :100] += 5 * abilities[:, None]  # in domain a the stronger model is always worse
    plain = strength(losses, abilities)
    assert plain[:100].max() < plain[100:].mean()
    quantile = strength(losses, abilities, Rule(normalise="quantile"), domains=domains)
    assert [quantile[rows].mean() for rows in np.split(np.arange(300), 3)] == pytest.approx([0.5] * 3)
    zscore = strength(losses, abilities, Rule(normalise="zscore"), domains=domains)
    scaled = [(part - part.mean(1, keepdims=True)) / part.std(1, keepdims=True) for part in np.split(losses, 3, 1)]
    np.testing.assert_allclose(zscore, brute_force(np.concatenate(scaled, 1), abilities), atol=1e-12)


def test_equal_abilities_form_no_pair_and_one_model_no_ladder() -> None:
    losses, abilities = sample(7, 4, 30)
    abilities = np.array([1.0, 1.0, 2.0, 3.0])
    assert [tuple(pair) for pair in model_pairs(abilities)[0]] == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    np.testing.assert_allclose(strength(losses, abilities), brute_force(losses, abilities), atol=1e-12)
    for bad in (np.ones(4), np.ones(1)):
        with pytest.raises(DataError, match="different ability"):
            strength(losses[: len(bad)], bad)
    with pytest.raises(DataError, match="positive weight"):
        strength(losses, abilities, weights=np.array([0.0, 0.0, 0.0, 1.0]))


def test_a_loss_that_is_not_finite_gives_no_strength() -> None:
    losses, abilities = sample(8, 4, 10)
    losses[2, 3], losses[0, 7] = np.nan, np.inf
    found = strength(losses, abilities)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 7]
    rest = np.delete(np.arange(10), [3, 7])
    np.testing.assert_array_equal(found[rest], strength(losses[:, rest], abilities))
    assert all(0 <= row["agreement"] <= 1 for row in pair_agreement(losses, abilities))


def test_bad_options() -> None:
    losses, abilities = sample(9, 3, 5)
    with pytest.raises(ConfigError, match="normalise"):
        strength(losses, abilities, Rule(normalise="domain"))
    with pytest.raises(ConfigError, match="standard errors"):
        strength(losses, abilities, Rule(margin=1.0))
    with pytest.raises(ConfigError, match="standard errors"):
        strength(losses, abilities, Rule(margin=1.0, normalise="zscore"), errors=np.ones_like(losses))


def test_many_rankings_at_once_equal_one_at_a_time() -> None:
    losses, _ = sample(10, 6, 40, levels=2)
    rankings = np.array([np.random.default_rng(seed).permutation(6).astype(float) for seed in range(30)])
    rankings[0] = [1, 1, 2, 3, 3, 4]
    expected = [strength(losses, ranking) for ranking in rankings]
    np.testing.assert_allclose(strengths_of_rankings(losses, rankings), expected, atol=1e-12)


def test_random_losses_carry_no_strength() -> None:
    losses, abilities = sample(11, 6, 20_000)
    found = strength(losses, abilities)
    assert found.mean() == pytest.approx(0.5, abs=0.005)
    assert (found == 1).mean() == pytest.approx(1 / 720, abs=0.001)  # one order of six models in 6!


def test_agreement_of_pairs() -> None:
    losses = np.array([[3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 1.0, 5.0]])
    rows = {(row["weaker"], row["stronger"]): row for row in pair_agreement(losses, np.array([10.0, 20.0, 30.0]))}
    assert {pair: row["agreement"] for pair, row in rows.items()} == {(0, 1): 0.5, (0, 2): 0.75, (1, 2): 0.75}
    assert rows[0, 1]["mean_gap"] == 0.0


def test_positives_and_negatives() -> None:
    strengths = np.array([1.0, 0.2, 0.9, np.nan, 1.0, 0.0, 0.9, 0.4])
    positives, negatives = positives_and_negatives(strengths)
    assert sorted(positives) == [0, 4]
    assert negatives.tolist() == [5, 1]  # from the lowest upwards
    positives, negatives = positives_and_negatives(strengths, least=0.9, most=3)
    assert {0, 4} < set(positives)
    assert negatives.tolist() == [5, 1, 7]
    again = [positives_and_negatives(np.zeros(50) + (np.arange(50) < 5), seed=seed)[1].tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]  # the draw among equals is the seed's
    for bad in (np.array([0.5, 0.2]), np.array([1.0, 1.0]), np.array([np.nan]), np.array([])):
        with pytest.raises(DataError, match="both kinds"):
            positives_and_negatives(bad)
