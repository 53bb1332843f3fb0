"""The memory that ``sundog plan`` predicts beside what a training step takes.

    python -m benchmarks.memory [--quick] [--json FILE]

Every case is trained for two steps by the run's own code. Measured is the peak of tensor memory on rank 0, from every
allocation and release that torch's allocator reports, from before the model is built. A process takes more: its
interpreter and libraries, and what the C allocator keeps of what was released.
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.table import arguments
from conf.memory import memory_per_rank
from conf.schema import RunConfig
from tests.distributed.training_runs import make_config
from tests.helpers.dist import run_distributed

LET_GO_SEC = 0.005
STEPS = 2  # the second one meets the optimizer's state
BOUND = 0.10


@dataclass(frozen=True)
class Size:
    dim: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "1M": Size(128, 4, 4, 4, 2048),
    "deep": Size(96, 6, 3, 3, 1024),
    "3M": Size(192, 4, 6, 3, 4096),
    "wide": Size(256, 2, 4, 2, 16_384),
}


@dataclass(frozen=True)
class Case:
    size: str
    context: int
    micro_batch: int
    accumulate: int = 1
    recompute: str = "none"
    sharding: str = "ddp"
    ranks: int = 1
    precision: str = "fp32"

    @property
    def name(self) -> str:
        parts = [self.size, f"{self.micro_batch} x {self.context}", f"recompute {self.recompute}"]
        parts += [f"{self.sharding} on {self.ranks}", self.precision]
        return ", ".join(parts + ([f"{self.accumulate} micro batches"] if self.accumulate > 1 else []))

    def config(self, root: Path) -> RunConfig:
        config = make_config(root, "memory", trainer__steps=STEPS, trainer__micro_batch=self.micro_batch)
        size, model = SIZES[self.size], config.model
        model.dim, model.layers, model.heads, model.kv_heads = size.dim, size.layers, size.heads, size.kv_heads
        config.data.context, config.data.vocab_size = self.context, size.vocabulary
        config.trainer.batch = self.micro_batch * self.accumulate * self.ranks
        config.trainer.recompute, config.trainer.precision = self.recompute, self.precision
        config.sharding.kind, config.cluster.ranks = self.sharding, self.ranks
        return config


def cases(quick: bool) -> Iterator[Case]:
    """Those of one rank first."""
    shapes = [("1M", 64, 2), ("deep", 256, 2), ("3M", 256, 4), ("3M", 1024, 1), ("wide", 128, 1)]
    for (size, context, micro), recompute in itertools.product(shapes[:2] if quick else shapes, RECOMPUTE):
        yield Case(size, context, micro, recompute=recompute)
    for size in ("1M", "deep"):
        yield Case(size, 128, 1, accumulate=2)
        yield Case(size, 128, 2, precision="bf16")
    kinds = ("ddp", "fsdp") if quick else ("ddp", "fsdp", "zero1", "zero2", "zero3")
    for sharding, size, recompute in itertools.product(kinds, ("1M", "deep"), ("none", "full")):
        yield Case(size, 128, 2, recompute=recompute, sharding=sharding, ranks=2)
    for sharding in kinds:
        yield Case("1M", 128, 1, accumulate=2, sharding=sharding, ranks=2)


RECOMPUTE = ("none", "selective", "full")


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of tensors that ``work`` has alive at once."""
    import torch

    gc.collect()  # what an earlier case left must not be released in this one
    with (
        _collectives_let_go_first(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        work()
    profiler: Any = profile.profiler
    events = [(e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(events, key=lambda event: event[0])))


@contextmanager
def _collectives_let_go_first() -> Iterator[None]:
    """The profiler sees what this thread releases. A collective's tensors are held by a thread of gloo's as well, which
    lets go of them a moment after ``wait`` returns: were it the last one, their release would not be counted."""
    import torch.distributed as dist

    wait: Any = dist.Work.wait

    def wait_longer(self: Any, *arguments: Any, **options: Any) -> Any:
        done = wait(self, *arguments, **options)
        time.sleep(LET_GO_SEC)
        return done

    setattr(dist.Work, "wait", wait_longer)  # noqa: B010 - to a type checker it is not there to be set
    try:
        yield
    finally:
        setattr(dist.Work, "wait", wait)  # noqa: B010


def train(rank: int, world_size: int, configs: list[RunConfig]) -> list[int]:
    """Train them one after another on this rank; the peaks of tensor memory."""
    return [peak_of(partial(_train, config)) for config in configs]


def _train(config: RunConfig) -> None:
    import torch

    from conf.rules import mesh_sizes
    from models.decoder import Decoder, ModelSpec
    from parallel.apply import parallelize, take_optimizer
    from parallel.mesh import build_mesh
    from trainers.optim import build_optimizer
    from trainers.step import train_step

    mesh = build_mesh(mesh_sizes(config), "cpu")
    spec = ModelSpec.from_config(config.model, config.data.vocab_size, config.data.context)
    model = parallelize(Decoder(spec).initialise(0), mesh, config)
    optimizer = build_optimizer(model, config.trainer)
    model = take_optimizer(model, optimizer, mesh, config)
    rows = config.trainer.batch // mesh.dp_size
    for step in range(STEPS):
        tokens = torch.randint(config.data.vocab_size, (rows, config.data.context))
        positions = torch.arange(config.data.context).expand_as(tokens)
        batch = {"tokens": tokens, "labels": tokens, "positions": positions, "document_ids": positions * 0}
        train_step(model, optimizer, batch, step, mesh, config)


def main() -> int:
    chosen = arguments("The memory that `sundog plan` predicts beside what a training step takes.")
    rows: list[dict[str, Any]] = []
    print(f"{'case':<62} predicted  measured  error (MB of tensors)")
    for ranks, group in itertools.groupby(cases(chosen.quick), key=lambda case: case.ranks):
        chosen_cases = list(group)
        configs = [case.config(Path("unused")) for case in chosen_cases]
        peaks = run_distributed(train, ranks, configs, timeout=60.0 * len(configs))[0]
        for case, config, measured in zip(chosen_cases, configs, peaks, strict=True):
            predicted = memory_per_rank(config, config.data.vocab_size).total
            error = predicted / measured - 1
            rows.append({"case": case.name, "predicted": predicted, "measured": measured})
            print(f"{case.name:<62} {predicted / 1e6:9.1f} {measured / 1e6:9.1f} {error:+6.1%}", flush=True)
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    print(f"{len(rows)} cases, largest error {worst:.1%}, {BOUND:.0%} is asked for")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
