"""Decontamination: word n-grams that a document shares with evaluation sets (Brown et al. 2020, appendix C).

Words are as MinHash takes them: lower case, letters and digits. An item shorter than n words counts as a whole.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from conf.curate import CurationConfig
from conf.errors import ConfigError, DataError
from data.annotators import Annotator, Documents, listed_files
from data.steps.kind import Verdicts, column
from data.steps.minhash import WORD, Bits, shingles

REASONS = ("contaminated",)
EDITS = ""
JSON = (".jsonl", ".json", ".ndjson")
MIN_WORDS = 8  # of an item that is shorter than n words: fewer are found by chance


@dataclass(frozen=True)
class Decontaminate(Annotator):
    """``matches``: how many different n-grams of the evaluation sets a document holds."""

    sets: str
    ngram: int
    NAME: ClassVar[str] = "decontaminate"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([("matches", pa.int64())])
    FILES: ClassVar[tuple[str, ...]] = ("sets",)

    @cached_property
    def known(self) -> dict[int, Bits]:
        """Sorted n-gram hashes of the evaluation sets, by n."""
        found: dict[int, list[Bits]] = {}
        for text in items(self.sets):
            words = len(WORD.findall(text))
            if words >= MIN_WORDS:
                size = min(self.ngram, words)
                found.setdefault(size, []).append(shingles(text, size))
        return {size: np.unique(np.concatenate(rows)) for size, rows in found.items()}

    def columns(self, documents: Documents) -> dict[str, Any]:
        return {"matches": [self.matches(text) for text in documents.texts]}

    def matches(self, text: str) -> int:
        """Different n-grams of a text that the sets hold."""
        total = 0
        for size, known in self.known.items():
            found = shingles(text, size)
            places = np.minimum(np.searchsorted(known, found), known.size - 1)
            total += int((known[places] == found).sum())
        return total


def items(path: str) -> Iterator[str]:
    """The texts of evaluation sets: every string of a JSON line, or every paragraph of a text file."""
    for file in listed_files(path):
        try:
            content = file.read_text(encoding="utf-8")
            if file.suffix in JSON:
                for line in content.splitlines():
                    yield from _strings(json.loads(line) if line.strip() else "")
            else:
                yield from content.split("\n\n")
        except (OSError, ValueError) as error:
            rule, fix = "evaluation sets are UTF-8 text or JSON lines", "check curation.decontaminate.sets"
            raise DataError(str(file), str(error)[:200], rule, fix) from error


def _strings(value: Any) -> Iterator[str]:
    """All strings below a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def annotator(config: CurationConfig) -> Annotator | None:
    settings = config.decontaminate
    if settings.enabled and not settings.sets:
        rule, fix = "decontamination needs evaluation sets", "a file or folder of text or JSON lines"
        raise ConfigError("curation.decontaminate.sets", "(empty)", rule, fix)
    return Decontaminate(settings.sets, settings.ngram) if settings.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    least = config.decontaminate.min_matches
    yield "contaminated", (least > 0) & (column(columns, "matches") >= least)
