"""The planner's question of a training run: its lengths, heads, dtype and ranks, from the config alone."""

from conf.rules import mesh_sizes, micro_batch
from conf.schema import RunConfig
from fused.mask import CAUSAL
from parallel.layout import named_layout
from parallel.plan.choose import Plan, plan
from parallel.plan.replay import Machines
from parallel.plan.topology import Speed, Topology
from parallel.ring.problem import Problem
from parallel.ring.scene import plain_scene
from parallel.ring.traffic import Widths
from parallel.strategies import STRATEGIES, find_strategy

ASSUMED_GBIT, ASSUMED_TFLOPS = 100.0, 100.0  # of a link and of a rank, where a plan is made before anything is measured
SEGMENT_TOKENS = 64  # tokens of the planned sequence that stand for one part of a rank's shard
GBIT = 1e9 / 8


def names(ranks: int, kv_heads: int) -> list[str]:
    """Strategies to compare: all that split a sequence, every shape of tile, head splits up to the key heads."""
    found = [name for name, strategy in STRATEGIES.items() if not strategy.single and name not in ("tile", "hybrid")]
    proper = [size for size in range(2, ranks) if ranks % size == 0]
    found += [f"tile:{row}" for row in proper]
    groups = [size for size in proper if kv_heads % size == 0]
    return found + [f"hybrid:{size}:{inner}" for size in groups for inner in ("ring", "bidirectional_ring", "tile")]


def problem_of(config: RunConfig) -> tuple[Problem, float]:
    """One sequence under a causal mask, planned at a short length; and the tokens that one of its tokens stands for.

    Documents are not known yet: with ``data.attention=document`` less is visible than planned with.
    """
    ranks, model = mesh_sizes(config).cp, config.model
    length = min(config.data.context, 2 * ranks * SEGMENT_TOKENS)
    layout = named_layout(config.sequence.layout, length, ranks)
    problem = plain_scene(layout, layout, CAUSAL, model.heads, model.kv_heads).problem
    return problem, config.data.context / length


def widths_of(config: RunConfig) -> Widths:
    head_dim = config.model.head_dim or config.model.dim // config.model.heads
    return Widths(micro_batch(config), head_dim, head_dim, 2 if config.trainer.precision == "bf16" else 4)


def stated_topology(config: RunConfig) -> Topology:
    """The links as the config states them, with assumptions for what it leaves to measuring."""
    sequence, ranks = config.sequence, mesh_sizes(config).cp
    speed = Speed((sequence.link_gbit or ASSUMED_GBIT) * GBIT)
    fabric = Speed((sequence.fabric_gbit or ASSUMED_GBIT) * GBIT)
    if sequence.topology == "two_level":
        return Topology("two_level", ranks, speed, sequence.island, fabric)
    kinds = {"ring": Topology("ring", ranks, speed), "mesh": Topology("mesh", ranks, speed)}
    return kinds.get(sequence.topology, Topology("port", ranks, speed))


def plan_run(config: RunConfig, topology: Topology, machines: Machines) -> Plan:
    """All strategies for one layer and micro batch of this run on these links."""
    problem, unit = problem_of(config)
    found = [find_strategy(name) for name in names(topology.size, config.model.kv_heads)]
    return plan(found, problem, widths_of(config), topology, machines, unit=unit)
