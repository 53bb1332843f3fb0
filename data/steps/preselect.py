"""PreSelect's scorer on every document; data/preselect/select.py finds the threshold over the whole corpus."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from conf.errors import ConfigError
from conf.schema import CurationConfig
from data.annotators import Annotator, Documents
from data.preselect.linear import LinearScorer, load_linear
from data.steps.kind import Verdicts

REASONS: tuple[str, ...] = ()
EDITS = ""
SCORE, CHARS, SOURCE = "preselect", "chars", "source"


@dataclass(frozen=True)
class Scored(Annotator):
    """``preselect``: log-odds that a document is one on which the ladder ranks by ability. ``model``: a folder."""

    model: str

    NAME: ClassVar[str] = "preselect"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([(SCORE, pa.float32()), (CHARS, pa.int64()), (SOURCE, pa.string())])
    FILES: ClassVar[tuple[str, ...]] = ("model",)

    @cached_property
    def scorer(self) -> LinearScorer:
        return load_linear(self.model)

    def columns(self, documents: Documents) -> dict[str, Any]:
        odds = self.scorer.log_odds(documents.texts)
        return {SCORE: odds, CHARS: list(map(len, documents.texts)), SOURCE: documents.column("source")}


def annotator(config: CurationConfig) -> Annotator | None:
    if not config.preselect.enabled:
        return None
    if not config.preselect.scorer:
        rule, fix = "it names the folder that `sundog scorer` wrote", "curation.preselect.scorer=DIR/preselect/scorer"
        raise ConfigError("curation.preselect.scorer", "(empty)", rule, fix)
    folder = Path(config.preselect.scorer).expanduser().absolute() / "linear"
    load_linear(folder)
    return Scored(str(folder))


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    del columns, config  # the threshold is a quantile of the whole corpus
    yield from ()
