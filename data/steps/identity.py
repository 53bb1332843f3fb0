"""Hashes that tell equal texts and equal ids; data/duplicates.py drops the repeats over the whole corpus."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from conf.schema import CurationConfig
from data.annotators import Annotator, Documents
from data.dedup import HASH_BYTES, id_hash, text_hash
from data.steps.kind import Verdicts

REASONS: tuple[str, ...] = ()
EDITS = ""
TEXT_HASH, ID_HASH = "text_hash", "id_hash"


@dataclass(frozen=True)
class Identity(Annotator):
    """``text_hash`` of the normalised text and ``id_hash`` of the id."""

    NAME: ClassVar[str] = "identity"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([(name, pa.binary(HASH_BYTES)) for name in (TEXT_HASH, ID_HASH)])

    def columns(self, documents: Documents) -> dict[str, Any]:
        return {TEXT_HASH: list(map(text_hash, documents.texts)), ID_HASH: list(map(id_hash, documents.ids))}


def annotator(config: CurationConfig) -> Annotator | None:
    del config  # an id names one document in all that follows, whatever the config
    return Identity()


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    del columns, config  # what repeats is known when the whole corpus is
    yield from ()
