"""Loops: word 5-grams and whole sentences that come again (rules of Gopher, arXiv 2112.11446), text that compresses.

What the source repeats the output may repeat.
"""

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
MIN_WORDS, LONG = 4, 8  # words of a sentence that counts; of one that may not stand there twice
RULE = re.compile(r"(?m)^[\s|:-]+$")  # the line under a table's head


def judge(output: Output, limits: OutputFilterConfig) -> str:
    text = RULE.sub("", output.text)
    found = (" ".join(WORD.findall(text[start:end].lower())) for start, end in sentences(text))
    counts = Counter(s for s in found if s.count(" ") >= MIN_WORDS - 1)
    again = any(n > limits.max_loops or (n > 1 and s.count(" ") >= LONG - 1) for s, n in counts.items())
    data = text.encode("utf-8", "replace")
    looped = again or len(data) > limits.max_compression * len(zlib.compress(data))
    share, own = MEASURE.columns(Documents.of([text, output.source]))["duplicate_5_grams"]
    return "repetition" if looped or share - own > limits.max_repeated_ngrams else ""
