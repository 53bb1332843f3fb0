"""The scorer's training set: documents of full predictive strength against as many of the lowest."""

import numpy as np
import numpy.typing as npt

from conf.errors import DataError


def positives_and_negatives(
    strengths: npt.NDArray[np.float64], least: float = 1.0, most: int = 0, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the positives (strength at least ``least``) and of as many negatives, lowest strength first.

    Documents of equal strength are drawn by the seed (arXiv 2503.00808, section 3.2, with the draw made explicit).
    ``most`` bounds each side, 0: no bound. No document is on both sides: with too few others, positives are drawn.

    Raises DataError when one side is empty.
    """
    shuffled = np.random.default_rng(seed).permutation(len(strengths))
    known = shuffled[np.isfinite(strengths[shuffled])]
    order = known[np.argsort(strengths[known], kind="stable")]
    high = strengths[order] >= least
    positives, others = order[high], order[~high]
    count = min(len(positives), len(others), most or len(order))
    if not count:
        value = f"{len(positives)} documents of strength >= {least:g}, {len(others)} below"
        rule = "the scorer learns from documents of both kinds"
        raise DataError("preselect.positive", value, rule, "lower preselect.positive, or sample more documents")
    # Positives beyond the count leave from the bottom, so the strongest stay where `least` is below 1.
    return positives[len(positives) - count :], others[:count]
