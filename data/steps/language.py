"""Language identification: n-gram profiles that come with resiliparse, or a fastText model such as lid.176."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from resiliparse.parse.lang import detect_fast

from conf.curate import CurationConfig
from conf.errors import DataError
from data.annotators import Annotator, Documents
from data.steps.kind import Verdicts, column

REASONS = ("language_unknown", "language_other")
EDITS = ""
LABEL = "__label__"
MAX_CHARS = 20_000  # of a text: its language is clear by then


def detect(text: str, *among: str) -> tuple[str, int]:
    """The language of a text by the built-in profiles (``among`` some), and its distance from the profile."""
    return detect_fast(text[:MAX_CHARS], cutoff=2**31 - 1, langs=list(among) or None)


@dataclass(frozen=True)
class Language(Annotator):
    """``language`` (ISO 639-1) and ``score``: a model's probability, or the distance from the built-in profile."""

    model: str
    NAME: ClassVar[str] = "language"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([("language", pa.string()), ("score", pa.float64())])
    FILES: ClassVar[tuple[str, ...]] = ("model",)

    @cached_property
    def fasttext(self) -> Any:
        import fasttext

        try:
            return fasttext.load_model(self.model)
        except ValueError as error:
            rule = "curation.language.model is a fastText model"
            raise DataError(self.model, str(error)[:200], rule, "lid.176.bin, or leave it empty") from error

    def columns(self, documents: Documents) -> dict[str, Any]:
        if not self.model:
            found = [detect(text) for text in documents.texts]
            return {"language": [name for name, _ in found], "score": [float(distance) for _, distance in found]}
        labels, scores = self.fasttext.predict([text[:MAX_CHARS].replace("\n", " ") for text in documents.texts], k=1)
        names = [row[0].removeprefix(LABEL) if len(row) else "unknown" for row in labels]
        return {"language": names, "score": [float(row[0]) if len(row) else 0.0 for row in scores]}


def annotator(config: CurationConfig) -> Annotator | None:
    return Language(config.language.model) if config.language.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    wanted, score = config.language, column(columns, "score")
    unsure = score < wanted.min_score if wanted.model else (wanted.max_distance > 0) & (score > wanted.max_distance)
    yield "language_unknown", unsure
    names = columns.column("language").to_pylist()
    yield "language_other", np.array([bool(wanted.languages) and name not in wanted.languages for name in names])
