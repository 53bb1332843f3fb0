"""Loops: word 5-grams and whole sentences that come again (rules of Gopher, arXiv 2112.11446), text that compresses."""

import re
import zlib
from collections import Counter

from conf.rephrase import OutputFilterConfig
from data.annotators import Documents
from data.rephrase.chunks import sentences
from data.rephrase.filters.kind import Output
from data.steps.minhash import WORD
from data.steps.repetition import Repetition

REASONS = ("repetition",)
MEASURE = Repetition()
SPAN = 7  # words in a row that stand in prose once, unless the source repeats them
MIN_WORDS, LONG = 4, 8  # words of a sentence that counts; of one that may not stand there twice
RULE = re.compile(r"(?m)^[\s|:-]+$")  # the line under a table's head


def judge(output: Output, limits: OutputFilterConfig) -> str:
    text = RULE.sub("", output.text)
    found = (" ".join(WORD.findall(text[start:end].lower())) for start, end in sentences(text))
    counts = Counter(s for s in found if s.count(" ") >= MIN_WORDS - 1)
    again = any(n > limits.max_loops or (n > 1 and s.count(" ") >= LONG - 1) for s, n in counts.items())
    data = text.encode("utf-8", "replace")
    looped = again or len(data) > limits.max_compression * len(zlib.compress(data))
    looped |= output.style.form == "prose" and not _spans_again(output.words) <= _spans_again(output.source_words)
    share = MEASURE.columns(Documents.of([text]))["duplicate_5_grams"][0]
    return "repetition" if looped or share > limits.max_repeated_ngrams else ""


def _spans_again(words: list[str]) -> set[tuple[str, ...]]:
    """The spans that stand there more than once."""
    counts = Counter(tuple(words[i : i + SPAN]) for i in range(len(words) - SPAN + 1))
    return {span for span, count in counts.items() if count > 1}
