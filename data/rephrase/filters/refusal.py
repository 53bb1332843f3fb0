"""Answers that refuse, apologise or talk to the reader as an assistant."""

import re

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output

REASONS = ("refusal",)
WHAT = r"(?:help|assist|provide|rewrite|rephrase|fulfil|comply|access|have|find|see|generate|create|write)"
PATTERN = re.compile(
    "|".join(
        (
            r"\bas an? (?:\w+ )?(?:ai|language model|assistant)\b",
            r"\bi(?:'m| am) (?:an? (?:ai|language model|assistant)|sorry|afraid|unable|not able)\b",
            rf"\bi (?:can(?:no|')t|can not|could ?n[o']t|won't|do not|don't) (?:\w+ )?{WHAT}",
            r"\b(?:i|we) apologi[sz]e\b|\bmy apologies\b|\bsorry,|\bi(?:'d| would) be (?:happy|glad)\b",
            r"\bhow (?:can|may) i (?:help|assist)\b|\bi'm here to help\b",
            r"\b(?:please|could you) (?:provide|share|give|send|clarify)\b.{0,40}"
            r"\b(?:text|paragraph|passage|context|information)",
            r"\bthe (?:provided |given )?(?:text|passage) (?:is|was) (?:missing|empty|not provided|too short)\b",
            r"\bno text (?:was|is|has been) (?:provided|given)",
        )
    ),
    re.IGNORECASE,
)


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    found = PATTERN.search(output.text)
    return "refusal" if found and not PATTERN.search(output.source) else ""
