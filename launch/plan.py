"""``sundog plan``: what the run needs and does, by its config alone. Starts nothing, imports neither torch nor Ray."""

from pathlib import Path

from conf.estimate import flops_per_token, parameter_count, ring_traffic, vocabulary
from conf.memory import memory_per_rank
from conf.rules import mesh_sizes, micro_batch
from conf.schema import RunConfig
from parallel.plan.choose import DIRECTIONS, explain
from parallel.plan.replay import Machine
from parallel.plan.run import ASSUMED_TFLOPS, GBIT, plan_run, stated_topology

SPREAD = {
    "ddp": "whole on every rank",
    "zero1": "optimizer spread over all ranks",
    "zero2": "gradients and optimizer spread over all ranks",
}
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
FLOPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human(number: float, scales: tuple[tuple[float, str], ...] = COUNTS) -> str:
    """Return a count with its magnitude: 1.24 B."""
    for scale, name in scales:
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number:.3g}"


def human_bytes(number: float) -> str:
    """Return bytes in binary units: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("the last unit takes any number")


def describe_model(config: RunConfig, vocab_size: int) -> str:
    total, attention = flops_per_token(config.model, vocab_size, config.data.context)
    return (
        f"{human(parameter_count(config.model, vocab_size))} parameters, {human(total, FLOPS)}FLOP/token at context "
        f"{config.data.context:,} ({attention / total:.0%} of it causal attention)"
    )


def describe_mesh(config: RunConfig) -> str:
    mesh = mesh_sizes(config)
    return (
        f"dp_replicate {mesh.dp_replicate} x dp_shard {mesh.dp_shard} x cp {mesh.cp} = {mesh.ranks} ranks, "
        f"{config.sharding.kind}, {config.sequence.strategy} ({config.sequence.layout})"
    )


def describe_traffic(config: RunConfig) -> str:
    mesh, traffic = mesh_sizes(config), ring_traffic(config)
    if mesh.cp == 1:
        return "none: each sequence stays on one rank"
    passes = config.model.layers * config.trainer.batch // (mesh.dp * micro_batch(config))
    whole = passes * (traffic.forward + traffic.backward)
    return (
        f"busiest link, per layer and ring step: {human_bytes(traffic.forward_step)} forward, "
        f"{human_bytes(traffic.backward_step)} backward; per rank and optimizer step {human_bytes(whole)}"
    )


def describe_candidates(config: RunConfig) -> str:
    """Return what the planner says of every strategy on the links that the config states or leaves open."""
    sequence, topology = config.sequence, stated_topology(config)
    machine = Machine((sequence.rank_tflops or ASSUMED_TFLOPS) * 1e12)
    found = plan_run(config, topology, dict.fromkeys(DIRECTIONS, machine))
    stated = "stated" if sequence.link_gbit and sequence.rank_tflops else "assumed where the config states nothing"
    links = (
        f"{topology.kind}, {topology.speed.bandwidth / GBIT:g} Gbit/s each way, {machine.flops / 1e12:g} TFLOP/s a rank"
    )
    facts = {"links": f"{links} ({stated}; sequence=auto measures before training)"}
    return "\n".join(f"         {line}" for line in explain(found, facts).splitlines())


def describe_horizon(config: RunConfig, vocab_size: int) -> str:
    trainer, data = config.trainer, config.data
    step = trainer.batch * data.context
    total, _ = flops_per_token(config.model, vocab_size, data.context)
    return (
        f"{human(step * trainer.steps)} tokens, {trainer.steps:,} steps of {human(step)}; "
        f"{human(total * step * trainer.steps, FLOPS)}FLOP in all"
    )


def resume_state(config: RunConfig) -> str:
    """Return where a train command would start."""
    complete = sorted(Path(config.run_dir, "checkpoints").glob("step-*/COMPLETE"))
    return f"resume from {complete[-1].parent.name}" if complete else "resume: none found, starts at step 0"


def main(name: str, config: RunConfig) -> int:
    vocab_size = vocabulary(config)
    memory = memory_per_rank(config, vocab_size)
    spread = SPREAD.get(config.sharding.kind, "spread over dp_shard x cp")
    print(f"model    {describe_model(config, vocab_size)}")
    print(f"mesh     {describe_mesh(config)}")
    print(
        f"memory   {human_bytes(memory.total)} per rank: weights, gradients, optimizer {human_bytes(memory.state)} "
        f"({spread}), activations {human_bytes(memory.activations)}, ring buffers {human_bytes(memory.buffers)}"
    )
    print(f"ring     {describe_traffic(config)}")
    if config.sequence.strategy == "auto" and mesh_sizes(config).cp > 1:
        print(describe_candidates(config))
    print(f"horizon  {describe_horizon(config, vocab_size)}")
    print(f"output   {config.run_dir}; {resume_state(config)}")
    return 0
