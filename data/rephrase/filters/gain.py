"""The output is written about as well as its source, or better (ReWire, arXiv 2506.04689, keeps the best of them)."""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output

REASONS = ("low_quality", "no_gain")


def judge(output: Output, limits: OutputFilterConfig) -> str:
    if output.quality < limits.min_quality:
        return "low_quality"
    return "no_gain" if output.quality - output.source_quality < limits.min_gain else ""
