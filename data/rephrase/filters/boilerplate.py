"""What assistants write around an answer: announcements before it, offers, notes and explanations behind it."""

import re

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.kind import Output

REASONS = ("boilerplate",)
NOUN = (
    r"(?:re-?writ\w*|re-?phras\w*|paraphras\w*|version|text|summary|tutorial|table|faq|page|conversation|dialogue|"
    r"questions?|problem|passage|paragraph|explanation|breakdown|answer|article|guide)"
)
DONE = r"(?:re-?written|rephrased|paraphrased|simplified|new)"
START = r"\A\W*"
OPENING = re.compile(
    "|".join(
        (
            START + r"(?:sure|certainly|of course|absolutely|okay|ok|great|alright)\b\s*[,!.:]",
            START + r"(?:here(?:'s| is| are)|below (?:is|are)|let me|let's|i have|i've|i will|i'll)\b",
            START + rf"(?:the )?(?:following is|{NOUN} is as follows)",
            START + rf"(?:this is (?:a|the|my)|the (?:above|following|given|original|provided)) {NOUN}\b",
            START + rf"{DONE} {NOUN}\b",
            rf"\A[^\n.!?]{{0,60}}\b{NOUN}\b[^\n.!?|]{{0,40}}:\s*(?:\n|\Z|[A-Z\"])",
        )
    ),
    re.IGNORECASE,
)
CLOSING = re.compile(
    "|".join(
        (
            r"^\W*(?:note|explanation|disclaimer|p\.?s\.?|changes(?: made)?|comment)\b\s*:",
            r"\bi hope (?:this|that|it)\b|\blet me know\b|\bfeel free to\b|\bis there anything else\b",
            r"\bwould you like me to\b|\bi (?:have )?(?:re-?wrote|re-?written|rephrased|paraphrased|changed|added|"
            r"removed|kept|tried|simplified|used) (?:the|a|all|every|to|some)\b",
            rf"\bthis {DONE} {NOUN}\b|\bin this {DONE} {NOUN}\b|\bthe original (?:text|passage|paragraph)\b",
            r"\bif you (?:have any|need (?:any|more|further))\b",
        )
    ),
    re.IGNORECASE | re.MULTILINE,
)
LABEL = re.compile(r"(?i)\A\W*(?:question|problem|solution|answer|q)\W*\d*\s*:")  # what a style itself asks for


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    opening = not LABEL.match(output.text) and OPENING.search(output.text)
    found = (opening, CLOSING.search(output.text))
    return "boilerplate" if any(f and not output.source_says(f.group()) for f in found) else ""
