"""Predictive strength: how well the losses of one document order a ladder of models by their ability.

Source: arXiv 2503.00808, section 3. With abilities ``A_1 < ... < A_N`` and normalised losses ``C_1(d) ... C_N(d)``,

    S(d) = sum_{i<j} w_ij 1[C_i(d) > C_j(d)] / sum_{i<j} w_ij,

in [0, 1]; the paper has ``w_ij = 1``. Without ties and weights it is (Kendall's tau-a + 1) / 2. What the paper leaves
open are options here: the value of a tie, a margin in standard errors below which a pair counts as tied, weights of
models (the pair's weight is their product), and a normalisation by domain. Models of equal ability form no pair.

Arrays: losses, errors ``[models, documents]``; abilities, weights ``[models]``. A document with a loss that is not
finite has the strength NaN.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import ConfigError, DataError

Array = npt.NDArray[np.float64]
NORMALISATIONS = ("none", "quantile", "zscore")


@dataclass(frozen=True)
class Rule:
    """What counts as a won pair."""

    ties: float = 0.5  # value of a pair whose losses are equal, or closer than the margin
    margin: float = 0.0  # standard errors of the difference below which a pair is tied
    normalise: str = "none"  # zscore: of each model's losses in a domain; quantile: of the strength in its domain


def model_pairs(abilities: Array, weights: Array | None = None) -> tuple[npt.NDArray[np.int64], Array]:
    """(weaker, stronger) models of all pairs that differ in ability, [pairs, 2], and the pairs' weights.

    Raises DataError when no pair of positive weight is left.
    """
    each = np.ones(len(abilities)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(abilities, kind="stable")
    pairs = [(i, j) for i, j in itertools.combinations(order.tolist(), 2) if abilities[i] < abilities[j]]
    found = np.array([(i, j) for i, j in pairs if each[i] * each[j] > 0], dtype=np.int64).reshape(-1, 2)
    if not len(found):
        value = f"{len(abilities)} models, {len(set(np.asarray(abilities).tolist()))} different abilities"
        rule = "a ladder has at least two models of different ability and positive weight"
        raise DataError("preselect.ladder", value, rule, "add a model, or give the abilities that tell them apart")
    return found, each[found].prod(axis=1)


def strength(
    losses: Array,
    abilities: Array,
    rule: Rule | None = None,
    *,
    errors: Array | None = None,
    weights: Array | None = None,
    domains: npt.NDArray[Any] | None = None,
) -> Array:
    """The predictive strength of every document, [documents].

    ``errors`` are standard errors of the losses (for a margin), ``domains`` one name a document (for a normalisation).
    The error of a difference is taken as if the two losses were independent; they correlate, so it is an upper bound.

    Raises:
        ConfigError: an unknown normalisation.
        DataError: no two models differ in ability.
    """
    rule = rule or Rule()
    if rule.normalise not in NORMALISATIONS:
        raise ConfigError("preselect.normalise", rule.normalise, f"one of {', '.join(NORMALISATIONS)}", "none")
    pairs, pair_weights = model_pairs(abilities, weights)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(losses).all(axis=0))
    safe = np.where(finite, losses, 0.0)
    if rule.normalise == "zscore":
        safe = _zscores(safe, finite, domains)
        errors = None if errors is None else errors * np.nan  # no error is known of a z-score
    total = np.zeros(losses.shape[1])
    for row, won in zip(pair_weights, wins(safe, pairs, rule, errors), strict=True):
        total += row * won
    result = np.where(finite, total / pair_weights.sum(), np.nan)
    return _quantiles(result, domains) if rule.normalise == "quantile" else result


def wins(
    losses: Array, pairs: npt.NDArray[np.int64], rule: Rule | None = None, errors: Array | None = None
) -> Iterator[Array]:
    """For each pair: 1 where the weaker model has the greater loss, 0 where the smaller, ``ties`` else, [documents]."""
    rule = rule or Rule()
    if rule.margin > 0 and (errors is None or np.isnan(errors).all()):
        rule_text = "a margin counts standard errors, which z-scores and a table of losses alone do not have"
        raise ConfigError("preselect.margin", rule.margin, rule_text, "preselect.margin=0, or normalise=none")
    for weaker, stronger in pairs:
        difference = losses[weaker] - losses[stronger]
        bound = rule.margin * np.hypot(errors[weaker], errors[stronger]) if rule.margin and errors is not None else 0.0
        yield np.where(difference > bound, 1.0, np.where(difference < -bound, 0.0, rule.ties))


def pair_agreement(losses: Array, abilities: Array) -> list[dict[str, Any]]:
    """For each pair of models, how often and how clearly a document's losses agree with the abilities.

    Near-tied pairs carry the signal: a pair that agrees on almost every document says little about any one of them.
    """
    pairs, _ = model_pairs(abilities)
    finite = np.isfinite(losses).all(axis=0)
    kept = losses[:, finite]
    rows = []
    for (weaker, stronger), won in zip(pairs.tolist(), wins(kept, pairs), strict=True):
        gap = kept[weaker] - kept[stronger]
        rows.append(
            {
                "weaker": weaker,
                "stronger": stronger,
                "agreement": float(won.mean()) if won.size else float("nan"),
                "mean_gap": float(gap.mean()) if gap.size else float("nan"),
            }
        )
    return rows


def strengths_of_rankings(losses: Array, rankings: Array) -> Array:
    """Strength under many rankings at once, [rankings, documents]; ``rankings`` are abilities, [rankings, models].

    Ties of losses count 0.5. Documents must have finite losses only.
    """
    models = losses.shape[0]
    first, second = np.triu_indices(models, 1)
    signs = np.sign(losses[first] - losses[second])  # 1: the first model of the pair has the greater loss
    order = np.sign(rankings[:, second] - rankings[:, first])  # 1: the first model is the weaker one
    return 0.5 + 0.5 * (order @ signs) / np.abs(order).sum(axis=1, keepdims=True)


def _zscores(losses: Array, finite: npt.NDArray[np.bool_], domains: npt.NDArray[Any] | None) -> Array:
    """Each model's losses less their mean in the document's domain, over their deviation there."""
    scores = np.zeros_like(losses)
    for rows in _groups(finite, domains):
        part = losses[:, rows]
        deviation = part.std(axis=1, keepdims=True)
        scores[:, rows] = (part - part.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1.0)
    return scores


def _quantiles(values: Array, domains: npt.NDArray[Any] | None) -> Array:
    """The mid-rank of each value among those of its domain, in (0, 1)."""
    result = np.full_like(values, np.nan)
    for rows in _groups(np.isfinite(values), domains):
        part = values[rows]
        ordered = np.sort(part)
        below, upto = np.searchsorted(ordered, part, "left"), np.searchsorted(ordered, part, "right")
        result[rows] = (below + upto) / (2 * len(part))
    return result


def _groups(valid: npt.NDArray[np.bool_], domains: npt.NDArray[Any] | None) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers of the valid documents of each domain; one group where there are no domains."""
    names = np.zeros(len(valid), dtype=np.int64) if domains is None else np.unique(domains, return_inverse=True)[1]
    for name in np.unique(names[valid]):
        yield np.flatnonzero(valid & (names == name))
