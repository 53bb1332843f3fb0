"""The rules of C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2), as datatrove computes them.

Lines go first, then documents; what is left of a text are its edits. FineWeb runs it with ``terminal_punctuation`` off.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import EDIT, Verdicts, apply_edits, column
from data.steps.words import count_sentences

REASONS = ("c4_lorem_ipsum", "c4_curly_bracket", "c4_few_sentences")
EDITS = "c4_edits"
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
ENDS = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True)
class Cleaned:
    """One text without the lines that go. ``pieces`` are the spans that stay, a list a line."""

    text: str
    sentences: int
    lorem_ipsum: bool
    curly_bracket: bool
    pieces: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class CleanLines:
    """The line rules; a callable, so that steps which look at what is left share its view of a batch."""

    terminal_punctuation: bool
    min_line_words: int
    max_word_chars: int
    javascript: bool
    policy: bool
    citations: bool

    def __call__(self, texts: list[str]) -> list[Cleaned]:
        return [self.clean(text) for text in texts]

    def clean(self, text: str) -> Cleaned:
        """Applies the rules to every line, in the published order."""
        sentences, place = 0, 0
        kept, pieces = [], []
        lorem_ipsum = curly_bracket = False
        lowered = text.lower()
        javascript, lorem, curly = "javascript" in lowered, "lorem ipsum" in lowered, "{" in text
        policy = [phrase for phrase in POLICY if phrase in lowered] if self.policy else []
        for full in text.splitlines(keepends=True):
            start, place = place + len(full) - len(full.lstrip()), place + len(full)
            line = full.strip()
            chunks = line.split()
            if 0 < self.max_word_chars < len(line) and any(len(chunk) > self.max_word_chars for chunk in chunks):
                continue
            spans = [(start, start + len(line))]
            if self.citations and "[" in line and (marks := list(CITATION.finditer(line))):
                cuts = [0, *(at for mark in marks for at in mark.span()), len(line)]
                spans = [(start + a, start + b) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
                line = CITATION.sub("", line)
            if self.terminal_punctuation and (not line.endswith(ENDS) or line.endswith("...")):
                continue
            if len(chunks) < self.min_line_words:
                continue
            low = line.lower() if javascript or lorem or policy else ""
            lorem_ipsum = lorem_ipsum or (lorem and "lorem ipsum" in low)
            if self.javascript and javascript and "javascript" in low:
                continue
            curly_bracket = curly_bracket or (curly and "{" in line)
            if any(phrase in low for phrase in policy):
                continue
            sentences += count_sentences(chunks if len(spans) == 1 else line.split())
            kept.append(line)
            pieces.append(spans)
        return Cleaned("\n".join(kept).strip(), sentences, lorem_ipsum, curly_bracket, pieces)


def clean_lines(config: CurationConfig) -> dict[str, Any]:
    """Settings of ``CleanLines``; without C4's rules no line goes."""
    c4 = config.c4
    names = ("terminal_punctuation", "min_line_words", "max_word_chars", "javascript", "policy", "citations")
    return {name: getattr(c4, name) for name in names}


def edits_of(text: str, cleaned: Cleaned) -> list[dict[str, Any]]:
    """What turns the text into what is left of it."""
    if cleaned.text == text:
        return []
    edits: list[dict[str, Any]] = []
    place = 0
    for number, line in enumerate(cleaned.pieces):
        for index, (start, end) in enumerate(line):
            between = "\n" if index == 0 and number > 0 else ""
            if text[place:start] != between:
                edits.append({"start": place, "end": start, "text": between})
            place = end
    if place < len(text):
        edits.append({"start": place, "end": len(text), "text": ""})
    if apply_edits(text, edits) == cleaned.text:
        return edits
    return [{"start": 0, "end": len(text), "text": cleaned.text}]  # white space at an end that a citation had hidden


@dataclass(frozen=True)
class C4(Annotator):
    """Sentences in the lines that stay, marks of documents that go, and the edits."""

    terminal_punctuation: bool
    min_line_words: int
    max_word_chars: int
    javascript: bool
    policy: bool
    citations: bool
    NAME: ClassVar[str] = "c4"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [("sentences", pa.int64()), ("lorem_ipsum", pa.bool_()), ("curly_bracket", pa.bool_()), (EDITS, pa.list_(EDIT))]
    )

    def columns(self, documents: Documents) -> dict[str, Any]:
        rows = documents.view(CleanLines(**vars(self)))
        found: dict[str, Any] = {
            n: [getattr(r, n) for r in rows] for n in ("sentences", "lorem_ipsum", "curly_bracket")
        }
        found[EDITS] = [edits_of(text, row) for text, row in zip(documents.texts, rows, strict=True)]
        return found


def annotator(config: CurationConfig) -> Annotator | None:
    return C4(**clean_lines(config)) if config.c4.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    limits = config.c4
    yield "c4_lorem_ipsum", limits.lorem_ipsum & (column(columns, "lorem_ipsum") > 0)
    yield "c4_curly_bracket", limits.curly_bracket & (column(columns, "curly_bracket") > 0)
    yield "c4_few_sentences", column(columns, "sentences") < limits.min_sentences
