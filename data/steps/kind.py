"""What a step is: see ``data.steps``."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.schema import CurationConfig
from data.annotators import Annotator

Mask = npt.NDArray[np.bool_]
Verdicts = Iterator[tuple[str, Mask]]
EDIT = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("text", pa.string())])  # characters of the original


class Step(Protocol):
    """What a module of this package offers."""

    @property
    def REASONS(self) -> tuple[str, ...]: ...

    @property
    def EDITS(self) -> str: ...

    def annotator(self, config: CurationConfig) -> Annotator | None: ...

    def reasons(self, columns: pa.Table, config: CurationConfig) -> Verdicts: ...


def apply_edits(text: str, edits: list[dict[str, Any]]) -> str:
    """The text with spans replaced; of edits that overlap the one that begins first, then the longest, counts."""
    pieces, place = [], 0
    for edit in sorted(edits, key=lambda edit: (edit["start"], -edit["end"])):
        if edit["start"] >= place:
            pieces += [text[place : edit["start"]], edit["text"]]
            place = edit["end"]
    return "".join([*pieces, text[place:]])


def column(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """A column of numbers as a float64 array ``[rows]``; nothing measured is NaN."""
    return table.column(name).to_numpy().astype(np.float64)
