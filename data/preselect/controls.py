"""What a predictive strength is worth: reliability, permuted rankings, and what it says of the domains.

With models that differ in size alone almost every pair agrees on almost every document, and any statistic of the
strength comes close to what a permuted ranking gives. So each figure stands beside its distribution over permutations.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from data.preselect.strength import Array, strengths_of_rankings

PERMUTATIONS = 200
ROWS = 20_000  # documents that the permutations look at, drawn at random


def correlation(first: Array, second: Array) -> float:
    """Pearson's r over the rows where both are finite; NaN where it is not defined."""
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 3 or first[both].std() == 0 or second[both].std() == 0:
        return float("nan")
    return float(np.corrcoef(first[both], second[both])[0, 1])


def reliability(halves: tuple[Array, Array]) -> dict[str, float]:
    """Correlation of the strength from even tokens with that from odd ones, and Spearman-Brown for the whole."""
    r = correlation(*halves)
    return {"split_half": r, "spearman_brown": 2 * r / (1 + r) if r > -1 else float("nan")}


def domain_share(strengths: Array, domains: npt.NDArray[Any]) -> float:
    """Share of the strengths' variance that lies between domains (eta squared); NaN where there is no variance."""
    _, names = np.unique(domains, return_inverse=True)
    counts = np.bincount(names)
    means = np.bincount(names, strengths) / counts
    total = ((strengths - strengths.mean()) ** 2).sum()
    between = (counts * (means - strengths.mean()) ** 2).sum()
    return float(between / total) if total > 0 else float("nan")


def permuted(
    losses: Array, abilities: Array, halves: tuple[Array, Array], domains: npt.NDArray[Any], seed: int
) -> dict[str, dict[str, Any]]:
    """Statistics of the strength under the true ranking and under random ones (ties 0.5, no weights, no margin).

    For each statistic: ``true``, ``permuted`` (one value a permutation) and ``p``, the share of permutations at least
    as large (with the true one counted among them). Empty where no document has finite losses.
    """
    finite = np.flatnonzero(np.isfinite(losses).all(axis=0) & np.isfinite(halves[0]).all(axis=0))
    if not finite.size:
        return {}
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(finite, min(len(finite), ROWS), replace=False))
    rankings = np.array([abilities, *(random.permutation(abilities) for _ in range(PERMUTATIONS))])
    whole, even, odd = (strengths_of_rankings(part[:, rows], rankings) for part in (losses, *halves))
    statistics = {
        "mean strength": [float(row.mean()) for row in whole],
        "share of strength 1": [float((row == 1).mean()) for row in whole],
        "split-half reliability": [correlation(a, b) for a, b in zip(even, odd, strict=True)],
        "variance between domains": [domain_share(row, domains[rows]) for row in whole],
    }
    return {name: _against(values) for name, values in statistics.items()}


def _against(values: list[float]) -> dict[str, Any]:
    true, others = values[0], [value for value in values[1:] if np.isfinite(value)]
    p = (1 + sum(value >= true for value in others)) / (1 + len(others))
    return {"true": true, "permuted": others, "p": p if np.isfinite(true) else float("nan")}
