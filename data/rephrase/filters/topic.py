"""The output says what its source says: content words of the source come back, few are its own, endings aside.

Of prose each sentence of the source must come back in part. A negation may become a word of its own (does not close,
stays open), but where fewer stand in the output a negated sentence must come back as far as the whole text does.
"""

import re

from conf.rephrase import OutputFilterConfig
from data.rephrase.chunks import sentences
from data.rephrase.filters.kind import Output, content

REASONS = ("lost_content", "new_content", "lost_sentence", "lost_negation")
PART = 0.5  # of the style's share of kept words, that each sentence keeps
MIN_WORDS = 4  # content words of a sentence that counts
NEGATION = re.compile(r"(?i)\b(?:not|no|none|never|cannot|nor|neither|without|unless|except\w*|\w+n['\u2019]t)\b")


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    wanted, said, style = set(output.source_content), set(output.content), output.style
    shared = len(wanted & said)
    if shared < style.keep_words * len(wanted):
        return "lost_content"
    if shared < style.known_words * len(said):
        return "new_content"
    return _lost_sentence(output, said) if style.form == "prose" else ""


def _lost_sentence(output: Output, said: set[str]) -> str:
    negated = len(NEGATION.findall(output.text)) < len(NEGATION.findall(output.source))
    for start, end in sentences(output.source):
        sentence = output.source[start:end]
        words = set(content(sentence))
        kept, least = len(words & said), output.style.keep_words * len(words)
        if len(words) >= MIN_WORDS and kept < PART * least:
            return "lost_sentence"
        if negated and kept < least and NEGATION.search(sentence):
            return "lost_negation"
    return ""
