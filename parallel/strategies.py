"""All strategies of sequence parallelism by name.

A name may say more: ``tile:2`` has rows of two ranks, ``hybrid:2:token_ring`` splits the heads over groups of two and
runs TokenRing between the groups, and ``tile/ring`` takes one strategy forward and another backward.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial

from conf.errors import ConfigError
from conf.rules import nearest
from parallel.ring import (
    allgather,
    bidirectional_query,
    bidirectional_ring,
    hybrid,
    local,
    ring,
    tile,
    token_ring,
    ulysses,
)
from parallel.ring.problem import Problem
from parallel.ring.schedule import Build, Direction, Schedule, Strategy

BUILDS: dict[str, Build] = {
    "local": local.build,
    "ring": ring.build,
    "bidirectional_ring": bidirectional_ring.build,
    "token_ring": token_ring.build,
    "bidirectional_query": bidirectional_query.build,
    "tile": tile.build,
    "ulysses": ulysses.build,
    "hybrid": partial(hybrid.build, inner=ring.build),
    "allgather": allgather.build,
    "allgather_query": partial(allgather.build, side="query"),
}


def _kept(build: Build, direction: Direction) -> Callable[[Problem], Schedule]:
    """Schedules of one direction, built once for each problem."""
    return lru_cache(maxsize=256)(lambda problem: build(problem, direction))


def _strategy(name: str, build: Build) -> Strategy:
    return Strategy(name, _kept(build, "forward"), _kept(build, "backward"), single=build is local.build)


STRATEGIES: dict[str, Strategy] = {name: _strategy(name, build) for name, build in BUILDS.items()}


def _parameter(name: str, text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ConfigError("strategy", name, "a number of ranks after the colon", "tile:2, or hybrid:2:ring")
    return int(text)


@cache
def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: there is none; the message names the known ones and the nearest.
    """
    if "/" in name:
        forward, backward = (find_strategy(part) for part in name.split("/", 1))
        return Strategy(name, forward.forward, backward.backward, forward.single or backward.single)
    base, *parameters = name.split(":")
    known = tuple(STRATEGIES)
    if base not in STRATEGIES:
        raise ConfigError("strategy", name, f"one of {', '.join(known)}", nearest(base, known))
    if not parameters:
        return STRATEGIES[base]
    if base == "tile" and len(parameters) == 1:
        return _strategy(name, partial(tile.build, row=_parameter(name, parameters[0])))
    if base == "hybrid" and len(parameters) == 2 and parameters[1] in BUILDS and parameters[1] != "local":
        group, inner = _parameter(name, parameters[0]), BUILDS[parameters[1]]
        return _strategy(name, partial(hybrid.build, inner=inner, group=group))
    raise ConfigError("strategy", name, "tile takes a row, hybrid a group and a strategy", "tile:2, or hybrid:2:ring")


def rank_divisor(strategy: Strategy) -> int:
    """What the number of ranks must be a multiple of."""
    sizes = [int(part) for half in strategy.name.split("/") for part in half.split(":")[1:2]]
    return max(sizes, default=1)
