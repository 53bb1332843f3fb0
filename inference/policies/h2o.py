"""Heavy hitters: tokens with the largest sum of attention stay (H2O, arXiv:2306.14048, algorithm 1)."""

from inference.policies.base import ScoredPolicy


class H2O(ScoredPolicy):
    """Half of the budget for heavy hitters of each key-value head, half for the most recent tokens.

    The score of a token is the attention that all rows have paid to it, summed over the query heads of its key-value
    head. Keys keep the rotation of their own positions.
    """

    recent_share = 0.5
