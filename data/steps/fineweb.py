"""The quality rules of FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6), as datatrove computes them.

They look at what C4's line rules leave where those are on.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.c4 import CleanLines, clean_lines
from data.steps.kind import Verdicts, column
from data.steps.repetition import duplicates
from data.steps.words import SENTENCE_ENDS, count_words, split_words

REASONS = ("fineweb_empty", "fineweb_punctuation", "fineweb_short_lines", "fineweb_duplicate_lines", "fineweb_newlines")
EDITS = ""
NAMES = ("lines", "punctuated_lines", "short_lines", "duplicate_line_chars", "newlines")


@dataclass(frozen=True)
class FineWeb(Annotator):
    """Shares of the lines that are not empty, and line ends to words."""

    short_line_chars: int
    lines: dict[str, Any] = field(default_factory=dict)  # settings of C4's line rules; {}: the text as it is
    NAME: ClassVar[str] = "fineweb"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([(name, pa.float64()) for name in NAMES])

    def columns(self, documents: Documents) -> dict[str, Any]:
        if self.lines:
            texts = [cleaned.text for cleaned in documents.view(CleanLines(**self.lines))]
            words = np.array([count_words(text) for text in texts])
        else:
            texts, words = documents.texts, np.diff(documents.view(split_words).offsets)
        rows = [[line for line in text.split("\n") if line and not line.isspace()] for text in texts]
        counts = np.array([len(row) for row in rows])
        some = np.maximum(1, counts)
        chars = np.maximum(1, [len(text) - text.count("\n") for text in texts])
        return {
            "lines": counts,
            "punctuated_lines": np.array([sum(line[-1] in SENTENCE_ENDS for line in row) for row in rows]) / some,
            "short_lines": np.array([sum(len(x) <= self.short_line_chars for x in row) for row in rows]) / some,
            "duplicate_line_chars": np.array([duplicates(row)[1] for row in rows]) / chars,
            "newlines": np.array([text.count("\n") for text in texts]) / np.maximum(1, words),
        }


def annotator(config: CurationConfig) -> Annotator | None:
    lines = clean_lines(config) if config.c4.enabled else {}
    return FineWeb(config.fineweb.short_line_chars, lines) if config.fineweb.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    limits = config.fineweb
    yield "fineweb_empty", column(columns, "lines") == 0
    yield "fineweb_punctuation", column(columns, "punctuated_lines") < limits.min_punctuated_lines
    for reason, name, limit in (
        ("fineweb_short_lines", "short_lines", limits.max_short_lines),
        ("fineweb_duplicate_lines", "duplicate_line_chars", limits.max_duplicate_line_chars),
        ("fineweb_newlines", "newlines", limits.max_newline_ratio),
    ):
        yield reason, (limit > 0) & (column(columns, name) > limit)
