"""Answers that repeat the prompt: its sentences, sentinels, labels, or a chat's role tokens."""

import re
from functools import lru_cache

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output
from data.rephrase.styles import Style
from data.steps.minhash import WORD

REASONS = ("echo",)
SPAN = 5  # words in a row of the prompt
ROLES = re.compile(
    r"<\|?/?(?:im_start|im_end|system|user|assistant|endoftext|begin_of_text|eot_id|start_header_id|s|inst)\|?>|\[/?INST\]|"
    r"(?m:^\W{0,6}(?:system|user|assistant|human|ai|instructions?|prompt|document|original(?: text)?|source(?: text)?|"
    r"input|text|paragraph|passage)\W{0,3}:)",
    re.IGNORECASE,
)


@lru_cache(maxsize=64)
def _spans(style: Style) -> frozenset[tuple[str, ...]]:
    words = [WORD.findall(part.lower()) for part in (style.system, style.template)]
    return frozenset(tuple(part[i : i + SPAN]) for part in words for i in range(len(part) - SPAN + 1))


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    style, text = output.style, output.text
    if style.begin and (style.begin in text or style.end in text):
        return "echo"
    if (found := ROLES.search(text)) and not output.source_says(found.group()):
        return "echo"
    spans, words = _spans(style), output.words
    return "echo" if any(tuple(words[i : i + SPAN]) in spans for i in range(len(words) - SPAN + 1)) else ""
