"""Loss on a text, by the position of the token in its window."""

from pathlib import Path

from conf.errors import DataError
from conf.evaluate import EvaluateConfig
from inference.engine import Engine
from inference.methods import Methods
from inference.params import SamplingParams


def measure(engine: Engine, config: EvaluateConfig, task: str, methods: Methods) -> dict[str, float]:
    """Nats per token over all, and for positions from each power of two to the next.

    Raises DataError for a text that is missing or shorter than one window.
    """
    path = Path(config.text)
    if not path.is_file():
        raise DataError("evaluate.text", str(path), "must be a file", "give a text file")
    tokens = engine.encode(path.read_text(encoding="utf-8", errors="replace"))
    window = min(config.window, engine.context)
    starts = range(0, min(len(tokens) - window, (config.windows - 1) * window) + 1, window)
    if not starts:
        raise DataError("evaluate.text", f"{len(tokens)} tokens", f"must have {window} at least", "give a longer text")
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=True, methods=methods)
    sums: dict[int, list[float]] = {}
    for start in starts:
        generation = engine.start(tokens[start : start + window], params)
        engine.submit(generation)
        while engine.busy:
            engine.step()
        for place, entry in enumerate(generation.prompt_logprobs, 1):
            sums.setdefault(place.bit_length() - 1, []).append(-entry.value)
    found = {f"{2**power}-{2 ** (power + 1) - 1}": sum(values) / len(values) for power, values in sorted(sums.items())}
    every = [value for values in sums.values() for value in values]
    return {"all": sum(every) / len(every), **found}
