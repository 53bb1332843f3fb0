"""The quality rules of Gopher (Rae et al. 2021, arXiv 2112.11446, section A1.1), as datatrove computes them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import Verdicts, column
from data.steps.words import LETTERS, NOT_SYMBOLS, STOP_WORD, split_words

REASONS = (
    "gopher_few_words",
    "gopher_many_words",
    "gopher_short_words",
    "gopher_long_words",
    "gopher_hashes",
    "gopher_ellipses",
    "gopher_bullet_lines",
    "gopher_ellipsis_lines",
    "gopher_few_alpha_words",
    "gopher_few_stop_words",
)
EDITS = ""
NAMES = ("words", "mean_word", "hashes", "ellipses", "bullet_lines", "ellipsis_lines", "alpha_words", "stop_words")
BULLETS, ELLIPSES = ("•", "-"), ("...", "…")


@dataclass(frozen=True)
class Gopher(Annotator):
    """Words (punctuation alone is none) and their mean length; symbols to words; shares of lines and words."""

    NAME: ClassVar[str] = "gopher"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([(name, pa.float64()) for name in NAMES])

    def columns(self, documents: Documents) -> dict[str, Any]:
        words, texts = documents.view(split_words), documents.texts

        def per_text(values: Any) -> Any:
            """Sums over the words of each text."""
            before = np.concatenate([[0], np.cumsum(values)])
            return before[words.offsets[1:]] - before[words.offsets[:-1]]

        flags = words.flags[words.numbers]
        plain = (flags & NOT_SYMBOLS) > 0
        counted = per_text(plain)
        total = np.maximum(1, np.diff(words.offsets))
        stops = np.flatnonzero(flags & STOP_WORD)
        of_text = np.searchsorted(words.offsets, stops, side="right") - 1
        different = np.unique(np.stack([of_text, words.numbers[stops]]), axis=1)[0]
        lines = [text.splitlines() for text in texts]
        return {
            "words": counted,
            "mean_word": per_text(np.where(plain, words.lengths[words.numbers], 0)) / np.maximum(1, counted),
            "hashes": np.array([text.count("#") for text in texts]) / total,
            "ellipses": np.array([text.count("...") + text.count("…") for text in texts]) / total,
            "bullet_lines": [sum(x.lstrip().startswith(BULLETS) for x in row) / max(1, len(row)) for row in lines],
            "ellipsis_lines": [sum(x.rstrip().endswith(ELLIPSES) for x in row) / max(1, len(row)) for row in lines],
            "alpha_words": per_text((flags & LETTERS) > 0) / total,
            "stop_words": np.bincount(different, minlength=len(texts)),
        }


def annotator(config: CurationConfig) -> Annotator | None:
    return Gopher() if config.gopher.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    limits = config.gopher
    words, mean = column(columns, "words"), column(columns, "mean_word")
    yield "gopher_few_words", words < limits.min_words
    yield "gopher_many_words", (limits.max_words > 0) & (words > limits.max_words)
    yield "gopher_short_words", mean < limits.min_mean_word
    yield "gopher_long_words", (limits.max_mean_word > 0) & (mean > limits.max_mean_word)
    for name, limit in (
        ("hashes", limits.max_symbol_ratio),
        ("ellipses", limits.max_symbol_ratio),
        ("bullet_lines", limits.max_bullet_lines),
        ("ellipsis_lines", limits.max_ellipsis_lines),
    ):
        yield f"gopher_{name}", (limit > 0) & (column(columns, name) > limit)
    yield "gopher_few_alpha_words", column(columns, "alpha_words") < limits.min_alpha_words
    yield "gopher_few_stop_words", column(columns, "stop_words") < limits.min_stop_words
