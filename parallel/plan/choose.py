"""Chooses a strategy for each direction by predicted time, and says why."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from conf.errors import ConfigError
from parallel.plan.cost import Prediction, predict, weigh
from parallel.plan.replay import Machine, Machines
from parallel.plan.topology import Topology
from parallel.ring.problem import Problem
from parallel.ring.schedule import Direction, Strategy
from parallel.ring.traffic import Widths

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
TIE = 1.02  # predictions closer than this are no reason: the one that holds less memory is taken
HIDDEN = 0.05  # exposed communication below this share of the time counts as hidden


@dataclass(frozen=True)
class Candidate:
    """A strategy in one direction; without a prediction it cannot run, and ``reason`` says why."""

    strategy: str
    direction: Direction
    prediction: Prediction | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """What to run forward and backward, and all that was compared, the fastest first."""

    forward: str
    backward: str
    candidates: tuple[Candidate, ...]

    def of(self, direction: Direction) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.direction == direction)


def _reason(prediction: Prediction) -> str:
    if prediction.exposed < HIDDEN * prediction.seconds:
        return "communication is hidden behind computing"
    share = prediction.exposed / prediction.seconds
    return f"{share:.0%} of the time waits for messages"


def _candidate(
    strategy: Strategy,
    direction: Direction,
    problem: Problem,
    widths: Widths,
    topology: Topology,
    machine: Machine,
    memory: float,
    unit: float,
) -> Candidate:
    if strategy.single and problem.world_size > 1:
        return Candidate(strategy.name, direction, None, "keeps a whole sequence on one rank")
    try:
        build: Callable[[Problem], object] = getattr(strategy, direction)
        schedule = build(problem)
    except ConfigError as error:
        return Candidate(strategy.name, direction, None, error.rule)
    prediction, _ = predict(weigh(schedule, widths, unit), topology, machine)  # pyright: ignore[reportArgumentType]
    if prediction.memory > memory:
        reason = f"holds {prediction.memory / 2**20:.0f} MiB of other ranks, the limit is {memory / 2**20:.0f} MiB"
        return Candidate(strategy.name, direction, None, reason)
    return Candidate(strategy.name, direction, prediction, _reason(prediction))


def plan(
    strategies: Iterable[Strategy],
    problem: Problem,
    widths: Widths,
    topology: Topology,
    machines: Machines,
    memory: float = float("inf"),
    unit: float = 1.0,
) -> Plan:
    """Predict every strategy on these links and take the fastest of each direction.

    ``memory``: bytes of other ranks' blocks that a rank may hold at once. ``unit``: see :func:`weigh`.

    Raises:
        ConfigError: no strategy can run.
    """
    everything = list(strategies)
    chosen: dict[Direction, str] = {}
    ordered: list[Candidate] = []
    for direction in DIRECTIONS:
        found = [
            _candidate(s, direction, problem, widths, topology, machines[direction], memory, unit) for s in everything
        ]
        possible = [(c, c.prediction) for c in found if c.prediction is not None]
        if not possible:
            reasons = "; ".join(f"{c.strategy}: {c.reason}" for c in found)
            raise ConfigError("sequence.strategy", "auto", f"one strategy that can run ({reasons})", "fewer ranks")
        possible.sort(key=lambda pair: pair[1].seconds)
        close = [pair for pair in possible if pair[1].seconds <= TIE * possible[0][1].seconds]
        chosen[direction] = min(close, key=lambda pair: pair[1].memory)[0].strategy
        ordered += [c for c, _ in possible] + [c for c in found if c.prediction is None]
    return Plan(chosen["forward"], chosen["backward"], tuple(ordered))


COLUMNS = ("ms", "exposed", "busiest link", "MB on it", "MB in all", "held MB")


def explain(plan: Plan, describe: Mapping[str, str] | None = None) -> str:
    """All candidates as a table, the chosen ones marked; ``describe`` adds lines of facts above it."""
    lines = [f"{label:10} {text}" for label, text in (describe or {}).items()]
    for direction in DIRECTIONS:
        lines.append(f"{direction:24}" + "".join(f"{column:>14}" for column in COLUMNS))
        for candidate in plan.of(direction):
            mark = "*" if candidate.strategy == getattr(plan, direction) else " "
            name, p = f"{mark} {candidate.strategy:22}", candidate.prediction
            if p is None:
                lines.append(f"{name}{'cannot run: ' + candidate.reason}")
                continue
            cells = (
                f"{1e3 * p.seconds:.3g}",
                f"{1e3 * p.exposed:.3g}",
                p.busiest_link,
                f"{p.busiest_bytes / 1e6:.3g}",
                f"{p.total_bytes / 1e6:.3g}",
                f"{p.memory / 1e6:.3g}",
            )
            lines.append(name + "".join(f"{cell:>14}" for cell in cells) + f"  {candidate.reason}")
    return "\n".join(lines)
