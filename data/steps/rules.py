"""Quality rules that hold in every language: length, lines, letters, repeated lines, signs of a wrong encoding."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from conf.schema import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import Verdicts, column


@dataclass(frozen=True)
class Features:
    """What the rules know of a text."""

    chars: int
    visible: int  # characters that are not white space
    longest_line: int  # characters
    letters: float  # share of the visible characters; marks of scripts with combining vowels count
    repeated_lines: float  # share of the characters in non-empty lines that stood in the same text before
    replacements: float  # share of U+FFFD and control characters


FEATURE_FIELDS = [pa.field(f.name, pa.int64() if f.type is int else pa.float64()) for f in fields(Features)]
LINE_ENDS = re.compile(r"\r\n|\r|\n")


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    """``space``, ``letter``, ``bad`` (replacement and control characters) or ``other``."""
    if char.isspace():
        return "space"
    category = unicodedata.category(char)
    if char == "\ufffd" or category in ("Cc", "Cs"):
        return "bad"
    return "letter" if category[0] in "LM" else "other"


def character_counts(text: str) -> Counter[str]:
    """How often each character occurs."""
    if text.isascii():
        counts = np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=1)
        return Counter({chr(code): int(counts[code]) for code in np.flatnonzero(counts)})
    return Counter(text)


def measure(text: str) -> Features:
    """The features of a text. Time and memory are linear in its length."""
    kinds: Counter[str] = Counter()
    for char, count in character_counts(text).items():
        kinds[_kind(char)] += count
    visible = len(text) - kinds["space"]
    lines = LINE_ENDS.split(text)
    seen: set[str] = set()
    repeated = total = 0
    for line in lines:
        stripped = line.strip()
        total += len(stripped)
        if stripped in seen:
            repeated += len(stripped)
        seen.add(stripped)
    return Features(
        chars=len(text),
        visible=visible,
        longest_line=max(map(len, lines)),
        letters=kinds["letter"] / max(1, visible),
        repeated_lines=repeated / max(1, total),
        replacements=kinds["bad"] / max(1, len(text)),
    )


REASONS = ("empty", "too_short", "too_long", "wrong_encoding", "line_too_long", "few_letters", "repeated_lines")
EDITS = ""


@dataclass(frozen=True)
class Rules(Annotator):
    """The features, a column each."""

    NAME: ClassVar[str] = "rules"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema(FEATURE_FIELDS)

    def columns(self, documents: Documents) -> dict[str, Any]:
        rows = [measure(text) for text in documents.texts]
        return {name: [getattr(row, name) for row in rows] for name in self.SCHEMA.names}


def annotator(config: CurationConfig) -> Annotator | None:
    del config  # a document without text is never wanted
    return Rules()


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    """Each rule's verdict; a document that breaks several is counted under the first."""
    chars, line, bad, repeated = (
        column(columns, name) for name in ("chars", "longest_line", "replacements", "repeated_lines")
    )
    yield "empty", column(columns, "visible") == 0
    yield "too_short", chars < config.min_chars
    yield "too_long", (config.max_chars > 0) & (chars > config.max_chars)
    yield "wrong_encoding", (config.max_replacement_fraction > 0) & (bad > config.max_replacement_fraction)
    yield "line_too_long", (config.max_line_chars > 0) & (line > config.max_line_chars)
    yield "few_letters", column(columns, "letters") < config.min_letter_fraction
    yield (
        "repeated_lines",
        (config.max_repeated_line_fraction > 0) & (repeated > config.max_repeated_line_fraction),
    )
