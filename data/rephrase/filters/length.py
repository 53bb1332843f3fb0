"""Tokens of the output to those of its source, within the style's band."""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output

REASONS = ("short", "long")


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    ratio = output.tokens / max(1, output.source_tokens)
    least, most = output.style.length_ratio
    return "short" if ratio < least else "long" if ratio > most else ""
