"""Elastic runs: with how many ranks a run may go on, and when a smaller gang has room to grow.

The global batch and the order of the windows do not depend on the number of ranks (``data.loader``); the mesh does,
and is derived by the rules of ``conf`` for each number again.
"""

from dataclasses import replace

from cluster.placement import Sizes
from conf.errors import ConfigError
from conf.rules import check
from conf.schema import RunConfig


def with_ranks(config: RunConfig, ranks: int) -> RunConfig:
    """Return the config of the same run on another number of ranks."""
    return replace(config, cluster=replace(config.cluster, ranks=ranks))


def legal_sizes(config: RunConfig) -> Sizes:
    """Return the numbers of ranks from ``cluster.ranks`` down to ``cluster.min_ranks`` that make a legal mesh."""
    most, least = config.cluster.ranks, config.cluster.min_ranks or config.cluster.ranks
    legal, refused = [most], []
    for ranks in range(most - 1, least - 1, -1):
        try:
            check(with_ranks(config, ranks))
            legal.append(ranks)
        except ConfigError as error:
            refused.append(f"\n        not {ranks}: {error.field} = {error.value}: {error.rule}")
    return Sizes(tuple(legal), "".join(refused))
