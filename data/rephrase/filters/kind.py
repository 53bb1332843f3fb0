"""What a filter is and what it judges: see ``data.rephrase.filters``."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from conf.rephrase import OutputFilterConfig
from data.rephrase.clean import clean
from data.rephrase.quality import FUNCTION_WORDS
from data.rephrase.styles import Style
from data.steps.minhash import WORD

CODE = re.compile(r"(?<![\w.])(?:[A-Za-z_][\w.]*(?=\(\))|[A-Za-z_.]*[A-Za-z]_[A-Za-z]\w*)")  # identifiers
STEM = 5  # letters in which content words agree


def content(text: str) -> list[str]:
    """The content words of a text in their order, in lower case, endings aside."""
    words = WORD.findall(text.lower())
    return [word[:STEM] for word in words if word not in FUNCTION_WORDS and len(word) > 2]


def _has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.strip().lower())}(?!\w)", text.lower()) is not None


@dataclass(frozen=True)
class Output:
    """An answer beside its source. ``text`` is what is between the sentinels."""

    source: str
    raw: str
    finish: str  # stop or length
    style: Style
    source_tokens: int
    tokens: int  # of ``text``
    language: str  # of the source
    source_quality: float
    quality: float  # of ``text``

    @cached_property
    def text(self) -> str:
        return clean(self.raw, self.style).text

    @cached_property
    def words(self) -> list[str]:
        """Words of the text, in lower case."""
        return WORD.findall(self.text.lower())

    def source_says(self, phrase: str) -> bool:
        """Whether the source has a phrase, as whole words."""
        return _has(self.source, phrase)

    def says(self, phrase: str) -> bool:
        """Whether the output has a phrase, as whole words."""
        return _has(self.text, phrase)

    @cached_property
    def source_words(self) -> list[str]:
        return WORD.findall(self.source.lower())

    @cached_property
    def content(self) -> list[str]:
        return content(self.text)

    @cached_property
    def source_content(self) -> list[str]:
        return content(self.source)


class Filter(Protocol):
    """What a module of this package offers."""

    @property
    def REASONS(self) -> tuple[str, ...]: ...

    def judge(self, output: Output, limits: OutputFilterConfig) -> str: ...
