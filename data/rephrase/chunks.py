"""Chunks: pieces of a document of about a given number of tokens, cut where sentences end.

WRAP rephrases chunks of about 300 tokens because longer inputs lose information (arXiv 2401.16380, section 3). A
document of n tokens gives ceil(n / size) chunks of nearly equal size; chunks are spans of its text and together cover
all of it but white space.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data.steps.words import ABBREVIATIONS

Count = Callable[[str], int]
SLACK = 1.25  # of the size that one sentence may bring a chunk to
PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
ITEM = re.compile(r"\n(?=[ \t]*(?:[-*\u2022]|\d{1,3}[.)])[ \t])")  # a line that begins an entry of a list
END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f]+[\"')\]\u201d\u2019\u00bb]*(?=\s|$)|[\u3002\uff01\uff1f]")
LAST_WORD = re.compile(r"[^\s(\[\"'\u201c\u2018]+$")
OPENERS = "\"'([\u201c\u2018\u00ab"


@dataclass(frozen=True)
class Span:
    """A piece of a text: ``text[start:end]``, and its tokens."""

    start: int
    end: int
    tokens: int


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences of a text, without white space around. Paragraphs and list entries end sentences too."""
    cuts = {found.end() for pattern in (PARAGRAPH, ITEM) for found in pattern.finditer(text)}
    cuts |= {found.end() for found in END.finditer(text) if _ends(text, found)}
    spans, place = [], 0
    for cut in sorted({*cuts, len(text)}):
        piece = text[place:cut]
        stripped = piece.strip()
        if stripped:
            start = place + len(piece) - len(piece.lstrip())
            spans.append((start, start + len(stripped)))
        place = cut
    return spans


def _ends(text: str, found: re.Match[str]) -> bool:
    """Whether an end mark ends a sentence: not that of an abbreviation, an initial or a number before lower case."""
    rest = text[found.end() :].lstrip()[:2]
    if not rest:
        return True
    following = rest[1:] if rest[0] in OPENERS else rest
    if following[:1].islower():
        return False
    if found.group()[0] != "." or found.group().startswith(".."):
        return True
    word = LAST_WORD.search(text[max(0, found.start() - 40) : found.start()])
    last = word.group() + "." if word else "."
    initial = len(last) == 2 and last[0].isupper()
    return not (last in ABBREVIATIONS or initial)


def chunk(text: str, size: int, count: Count) -> list[Span]:
    """Cuts a text into chunks of about ``size`` tokens; no chunk has more than 1.25 times as many.

    A sentence that is longer than that is cut between words, a word between characters. Whole sentences are counted
    alone, so sums may differ from the count of the joined text by a token a sentence.
    """
    pieces = [piece for start, end in sentences(text) for piece in _short(text, start, end, int(size * SLACK), count)]
    total = sum(piece.tokens for piece in pieces)
    if not pieces:
        return []
    goal = total / max(1, -(-total // size))
    chunks: list[Span] = []
    begun: list[Span] = []
    for piece in pieces:
        held = sum(p.tokens for p in begun)
        overshoots = held + piece.tokens - goal > goal - held or held + piece.tokens > size * SLACK
        if begun and overshoots:
            chunks.append(Span(begun[0].start, begun[-1].end, held))
            begun = []
        begun.append(piece)
    return [*chunks, Span(begun[0].start, begun[-1].end, sum(p.tokens for p in begun))]


def _short(text: str, start: int, end: int, most: int, count: Count) -> Iterator[Span]:
    """A span, in halves between words while it has more than ``most`` tokens."""
    tokens = count(text[start:end])
    if tokens <= most or end - start < 2:
        yield Span(start, end, tokens)
        return
    middle = (start + end) // 2
    space = re.compile(r"\s")
    after, before = space.search(text, middle, end), None
    for found in space.finditer(text, start + 1, middle):
        before = found
    cuts = [found.start() for found in (before, after) if found is not None and start < found.start() < end]
    cut = min(cuts, key=lambda place: abs(place - middle), default=middle)
    left, right = text[start:cut].rstrip(), text[cut:end].lstrip()
    yield from _short(text, start, start + len(left), most, count)
    yield from _short(text, end - len(right), end, most, count)
