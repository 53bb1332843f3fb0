"""The output speaks of what its source speaks of: content words of the source that come back, endings aside."""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output
from data.rephrase.quality import FUNCTION_WORDS

REASONS = ("off_topic",)
STEM = 5  # letters in which words agree


def _stems(words: list[str]) -> set[str]:
    return {word[:STEM] for word in words if word not in FUNCTION_WORDS and len(word) > 2}


def judge(output: Output, limits: OutputFilterConfig) -> str:
    wanted, said = _stems(output.source_words), _stems(output.words)
    shared = len(wanted & said)
    least = limits.min_topic
    return "off_topic" if wanted and said and max(shared / len(wanted), shared / len(said)) < least else ""
