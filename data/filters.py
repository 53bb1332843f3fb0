"""Quality rules that hold in every language: features of a text, and one small pure function per rule.

Features are computed once and stored; a rule looks at features and thresholds alone, so a changed threshold never
reads a text again. A threshold of 0 switches its rule off.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import pyarrow as pa

from conf.schema import CurationConfig


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
FEATURE_NAMES = [f.name for f in FEATURE_FIELDS]
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


def empty(features: Features, config: CurationConfig) -> str | None:
    del config  # a document without text is never wanted
    return "empty" if features.visible == 0 else None


def too_short(features: Features, config: CurationConfig) -> str | None:
    return "too_short" if features.chars < config.min_chars else None


def too_long(features: Features, config: CurationConfig) -> str | None:
    return "too_long" if 0 < config.max_chars < features.chars else None


def line_too_long(features: Features, config: CurationConfig) -> str | None:
    return "line_too_long" if 0 < config.max_line_chars < features.longest_line else None


def wrong_encoding(features: Features, config: CurationConfig) -> str | None:
    return "wrong_encoding" if 0 < config.max_replacement_fraction < features.replacements else None


def few_letters(features: Features, config: CurationConfig) -> str | None:
    return "few_letters" if features.letters < config.min_letter_fraction else None


def repeated_lines(features: Features, config: CurationConfig) -> str | None:
    return "repeated_lines" if 0 < config.max_repeated_line_fraction < features.repeated_lines else None


# The first rule that a document breaks is the reason that is counted.
RULES: tuple[Callable[[Features, CurationConfig], str | None], ...] = (
    empty,
    too_short,
    too_long,
    wrong_encoding,
    line_too_long,
    few_letters,
    repeated_lines,
)


def judge(features: Features, config: CurationConfig) -> str | None:
    """The reason to drop a document, or None."""
    for rule in RULES:
        if (reason := rule(features, config)) is not None:
            return reason
    return None
