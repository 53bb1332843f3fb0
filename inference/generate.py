"""Continuation of prompts without a server."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from conf.serving import EngineConfig
from inference.engine import Engine
from inference.params import SamplingParams


def generate(
    model_folder: str | Path, prompts: Sequence[str], params: SamplingParams, settings: EngineConfig | None = None
) -> Iterator[tuple[int, str]]:
    """Continue the prompts one after another; yields (index of the prompt, next piece of its text).

    The pieces do not repeat the prompt, and join to the whole continuation.

    Raises:
        DataError: the folder cannot be read, or a prompt does not fit the model's context.
    """
    engine = Engine(model_folder, settings)
    for index, prompt in enumerate(prompts):
        for step in engine.stream(engine.encode(prompt), params):
            if step.text:
                yield index, step.text
