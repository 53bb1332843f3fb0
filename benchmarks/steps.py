"""How far training on ranks that share sequences drifts from one process: the losses of the same steps.

    python -m benchmarks.steps [--steps N] [--ranks N] [--json FILE]

The tests' tiny model in fp32, once in one process and once with queries going around, their gradients coming back over
neighbours, sharded parameters, recomputation and accumulation. Both add up the same numbers in another order, so their
losses differ by rounding, which training amplifies.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.distributed.training_runs import Case, curve, make_config, make_data, run_cases
from tests.helpers.dist import run_distributed

BOUND = 1e-4
SPLIT = {
    "sequence__strategy": "token_ring",
    "sequence__backward": "bidirectional_query",
    "sharding__kind": "fsdp",
    "trainer__recompute": "full",
    "trainer__micro_batch": 2,
}


def losses(steps: int, ranks: int) -> tuple[list[float], list[float]]:
    """By step, of one process and of the ranks."""
    rest = dict.fromkeys(("trainer__steps", "trainer__eval_every", "trainer__checkpoint_every"), steps)
    with tempfile.TemporaryDirectory(prefix="steps-") as folder:
        root = Path(folder)
        single, split = (
            make_config(root, name, trainer__lr=3e-3, **rest, **changes)
            for name, changes in (("single", {}), ("split", SPLIT))
        )
        make_data(single)
        for config, size in ((single, 1), (split, ranks)):
            run_distributed(run_cases, size, [Case(config)], timeout=3600)
        return curve(single), curve(split)


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of ranks that share sequences beside those of one process")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write both curves to FILE")
    options = parser.parse_args()
    one, several = losses(options.steps, options.ranks)
    largest = max(abs(b / a - 1) for a, b in zip(one, several, strict=True))
    verdict = "reached" if largest <= BOUND else "missed"
    print(
        f"{len(one)} steps, loss {one[0]:.4f} to {one[-1]:.4f}: {options.ranks} ranks differ from one process by "
        f"{largest:.1e} of the loss at most; wanted {BOUND:g}: {verdict}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"one process": one, "ranks": several}) + "\n")


if __name__ == "__main__":
    main()
