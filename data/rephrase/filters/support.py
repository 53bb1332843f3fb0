"""Weak signs of statements that the source does not make, weighed together; for prose.

Each sign alone is found in good rephrases too; models that invent also copy, in pieces. The weights are a logistic
regression on the labelled outputs that were at hand for it: ``python -m benchmarks.rephrase --fit`` prints them.
"""

import itertools
import math
import re
from collections import Counter

from conf.rephrase import OutputFilterConfig
from data.rephrase.chunks import sentences
from data.rephrase.filters.copying import copied_share
from data.rephrase.filters.kind import CODE, Output, content

REASONS = ("unsupported",)
NEGATION = re.compile(r"(?i)\b(?:not|no|none|never|cannot|nor|neither|without|unless|except\w*|\w+n['\u2019]t)\b")
LITERAL = re.compile(r"\"([^\"\n]{1,40})\"|(?<!\*)\*([^*\s][^*\n]{0,39})\*(?!\*)")  # quoted or emphasised
PLURAL = re.compile(r"(?<=[a-z]{2})s$")
MIN_WORDS = 3  # content words of a sentence that counts
MOST_NEGATIONS = 3
WEIGHTS = {
    "words kept": -2.52,
    "least kept of a sentence": -2.78,
    "longer": 5.62,
    "circles": 2.03,
    "literals lost": 7.29,
    "negations lost": 0.41,
    "words copied": 6.63,
}
BIAS = -2.31


def signs(output: Output) -> dict[str, float]:
    """The signs by name, 0 where there is none or where the style's own share of words is kept."""
    source, text = output.source_content, output.content
    wanted, said = set(source), set(text)
    kept = [
        len(words & said) / len(words)
        for start, end in sentences(output.source)
        if len(words := set(content(output.source[start:end]))) >= MIN_WORDS
    ]
    literals = {a or b for a, b in LITERAL.findall(output.source)} | set(CODE.findall(output.source))
    lost = sum(not (output.says(literal) or output.says(PLURAL.sub("", literal))) for literal in literals)
    negations = len(NEGATION.findall(output.source)) - len(NEGATION.findall(output.text))
    style = output.style
    return {
        "words kept": len(wanted & said) / max(1, len(wanted)) - style.keep_words,
        "least kept of a sentence": min(kept, default=1.0) - style.keep_words,
        "longer": max(0.0, len(text) / max(1, len(source)) - 1.0),
        "circles": math.log1p(_circles(text, Counter(source))),
        "literals lost": lost / (len(literals) + 1),
        "negations lost": float(min(max(0, negations), MOST_NEGATIONS)),
        "words copied": copied_share(output.words, output.source_words),
    }


def _circles(words: list[str], source: Counter[str]) -> int:
    """Pairs of neighbouring content words that stand there twice, and more often than the source has either word."""
    pairs = Counter(itertools.pairwise(words))
    return sum(n > max(1, min(source[a], source[b])) for (a, b), n in pairs.items())


def doubt(output: Output) -> float:
    """Probability, where good and bad ones are equally many, that an output states what its source does not."""
    return 1 / (1 + math.exp(-BIAS - sum(WEIGHTS[name] * value for name, value in signs(output).items())))


def judge(output: Output, limits: OutputFilterConfig) -> str:
    return "unsupported" if output.style.form == "prose" and doubt(output) > limits.max_doubt else ""
