"""What a run has to remember between two processes besides its tensors: the content of state.json."""

from dataclasses import asdict, dataclass
from typing import Any

from conf.schema import RunConfig
from trainers.lineage import config_digest, git_revision, stages

FORMAT = 1


@dataclass
class TrainState:
    """Where a run stands. The loader and the schedule are functions of the step, so the step is their position."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # of all windows trained on, padding included
    loss: float | None = None  # of the last step
    eval_loss: float | None = None  # of the last evaluation
    run_id: str = ""  # of the tracker

    def advance(self, tokens: int, loss: float) -> None:
        """Count one more optimizer step."""
        self.step, self.tokens, self.loss = self.step + 1, self.tokens + tokens, loss

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "TrainState":
        """Take what :func:`to_json` wrote."""
        return cls(state["step"], state["tokens"], state["loss"], state["eval_loss"], state["run_id"])


def identity(config: RunConfig, model: dict[str, Any], tokenizer: str, shards: str) -> dict[str, Any]:
    """Return what must not change between the start of a run and its last step.

    ``model`` is the spec as a dict, ``tokenizer`` and ``shards`` are a digest and a fingerprint. ``stream`` holds the
    settings that decide which window is read at which step.
    """
    stream = {
        "seed": config.seed,
        "trainer.batch": config.trainer.batch,
        "data.attention": config.data.attention,
        "data.positions": config.data.positions,
        "data.eval_fraction": config.data.eval_fraction,
    }
    return {"model": model, "tokenizer": tokenizer, "shards": shards, "stream": stream}


class StateWriter:
    """Adds to a :class:`TrainState` what is constant during a run; computed once."""

    def __init__(self, config: RunConfig, identity: dict[str, Any], world_size: int) -> None:
        self._constant = {
            "format": FORMAT,
            "seed": config.seed,
            "rng": "none kept: weights, batches and samples derive from the seed and the step",
            "identity": identity,
            "config": asdict(config),
            "config_digest": config_digest(config),
            "stages": {name: stage["fingerprint"] for name, stage in stages(config).items()},
            "git_revision": git_revision(),
            "world_size": world_size,
        }

    def to_json(self, state: TrainState) -> dict[str, Any]:
        """Return the content of state.json."""
        return self._constant | asdict(state)
