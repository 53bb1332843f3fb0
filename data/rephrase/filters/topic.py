"""The output says what its source says: content words of the source come back, few are its own, endings aside."""

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output
from data.rephrase.quality import FUNCTION_WORDS

REASONS = ("lost_content", "new_content")
STEM = 5  # letters in which words agree


def _stems(words: list[str]) -> set[str]:
    return {word[:STEM] for word in words if word not in FUNCTION_WORDS and len(word) > 2}


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    wanted, said = _stems(output.source_words), _stems(output.words)
    shared = len(wanted & said)
    if shared < output.style.keep_words * len(wanted):
        return "lost_content"
    return "new_content" if shared < output.style.known_words * len(said) else ""
