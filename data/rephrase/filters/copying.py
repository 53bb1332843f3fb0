"""How much of the output stands in the source word for word."""

from collections.abc import Sequence
from difflib import SequenceMatcher

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output

REASONS = ("copied",)
N = 4


def copied_share(output: Sequence[str], source: Sequence[str], n: int = N) -> float:
    """Share of the output's word n-grams that the source has; 0 for an output of fewer words."""
    known = {tuple(source[i : i + n]) for i in range(len(source) - n + 1)}
    grams = [tuple(output[i : i + n]) for i in range(len(output) - n + 1)]
    return sum(gram in known for gram in grams) / max(1, len(grams))


def longest_span(output: Sequence[str], source: Sequence[str]) -> int:
    """Words of the longest piece of the output that the source has."""
    return SequenceMatcher(None, output, source, autojunk=False).find_longest_match().size


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    style = output.style
    if copied_share(output.words, output.source_words) > style.max_copied:
        return "copied"
    return "copied" if style.max_span and longest_span(output.words, output.source_words) > style.max_span else ""
