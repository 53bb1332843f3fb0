"""What of a generator's raw answer is the rephrase: the text between the sentinels, without quotes or fences around."""

import re
from dataclasses import dataclass

from data.rephrase.styles import Style

FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
QUOTES = (('"', '"'), ("\u201c", "\u201d"))


@dataclass(frozen=True)
class Cleaned:
    """The text, and whether the answer had each sentinel."""

    text: str
    opened: bool
    closed: bool


def clean(raw: str, style: Style) -> Cleaned:
    """Cuts the rephrase out of an answer. A missing sentinel leaves that end as it is: the filters look at it."""
    found = ended = ""
    text = raw
    if style.begin:
        _, found, rest = raw.partition(style.begin)
        before, ended, _ = (rest if found else raw).partition(style.end)
        text = before
    text = text.strip()
    if fenced := FENCE.fullmatch(text):
        text = fenced.group(1).strip()
    for first, last in QUOTES:
        if (
            len(text) > 1
            and text[0] == first
            and text[-1] == last
            and first not in text[1:-1]
            and last not in text[1:-1]
        ):
            text = text[1:-1].strip()
    return Cleaned(text, bool(found), bool(ended))
