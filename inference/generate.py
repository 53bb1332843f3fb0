"""Continuation of prompts without a server."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.serving import EngineConfig
from inference.engine import Engine
from inference.params import SamplingParams
from inference.ranks import follow


def generate(
    model_folder: str | Path, prompts: Sequence[str], params: SamplingParams, settings: EngineConfig | None = None
) -> Iterator[tuple[int, str]]:
    """Continue the prompts one after another; yields (index of the prompt, next piece of its text).

    The pieces do not repeat the prompt, and join to the whole continuation.

    Raises:
        DataError: the folder cannot be read, or a prompt does not fit the model's context.
    """
    engine = Engine(model_folder, settings)
    try:
        for index, prompt in enumerate(prompts):
            for step in engine.stream(engine.encode(prompt), params):
                if step.text:
                    yield index, step.text
    finally:
        engine.close()


def generate_rank(config: dict[str, Any], control: Any) -> None:
    """One rank of a gang that continues ``config["prompts"]``; rank 0 emits {"index", "text"} for every piece."""
    if int(os.environ["RANK"]) > 0:
        follow(config)
        return
    settings, params = EngineConfig(**config["engine"]), SamplingParams(**config["params"])
    for index, piece in generate(config["model"], config["prompts"], params, settings):
        control.emit({"index": index, "text": piece})
        if control.stopping():
            return
