"""The filters on rephrases, one module each, in the order in which they decide.

A filter has ``REASONS`` (why it rejects) and ``judge(output, limits)``: one of them, or an empty string. What needs all
outputs at once (duplicates, evaluation sets) is decided behind them, in data/rephrase/repeats.py.
"""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters import (
    boilerplate,
    copying,
    echo,
    facts,
    finish,
    form,
    gain,
    language,
    length,
    refusal,
    repetition,
    support,
    topic,
)
from data.rephrase.filters.kind import Filter, Output

FILTERS: dict[str, Filter] = {
    "finish": finish,
    "refusal": refusal,
    "echo": echo,
    "boilerplate": boilerplate,
    "language": language,
    "length": length,
    "repetition": repetition,
    "form": form,
    "copying": copying,
    "topic": topic,
    "facts": facts,
    "gain": gain,
    "support": support,
}
REASONS = tuple(reason for module in FILTERS.values() for reason in module.REASONS)


def judge(output: Output, limits: OutputFilterConfig) -> str:
    """The first reason to reject an output, or an empty string."""
    return next((reason for module in FILTERS.values() if (reason := module.judge(output, limits))), "")


__all__ = ["FILTERS", "REASONS", "Output", "judge"]
