"""What `sundog evaluate` measures: each task is a file with ``measure``; all are in ``TASKS``."""

from collections.abc import Callable
from typing import Any

from conf.errors import ConfigError
from conf.evaluate import EvaluateConfig, check_evaluation
from conf.methods import PREFILLS
from inference.engine import Engine
from inference.evaluation import automata, harness, needles, perplexity
from inference.methods import FULL, NONE, Methods

TASKS: dict[str, Callable[[Engine, EvaluateConfig, str, Methods], dict[str, float]]] = {
    "needle": needles.measure,
    "thread_forward": needles.measure,
    "thread_backward": needles.measure,
    "perplexity": perplexity.measure,
    "automata": automata.measure,
    "harness": harness.measure,
}


def evaluate(config: EvaluateConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """All tasks with full attention, then under each policy: ``{policy: {task: {figure: value}}}``.

    Raises ConfigError and DataError for what cannot be measured.
    """
    check_evaluation(config)
    ways = {FULL: Methods(kv_policy=FULL, drafter=NONE)}
    for entry in config.policies:
        name, _, share = entry.partition(":")
        try:
            chosen = {"prefill": name, "prefill_budget": float(share)} if name in PREFILLS[1:] else {}
            ways[entry] = Methods(**(chosen or {"kv_policy": name, "kv_budget": float(share)}), drafter=NONE)
        except ValueError:
            raise ConfigError("evaluate.policies", entry, "POLICY:BUDGET, as h2o:0.2", "correct it") from None
    engine = Engine(config.model, config.engine)
    results: dict[str, Any] = {}
    for name, methods in ways.items():
        results[name] = {}
        for task in config.tasks:
            results[name][task] = found = TASKS[task](engine, config, task, methods)
            say(f"{name:<20} {task:<16} " + "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return results
