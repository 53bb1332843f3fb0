"""What a step is: see ``data.steps``."""

from collections.abc import Iterator
from typing import Protocol

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


def column(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """A column of numbers as a float64 array ``[rows]``; nothing measured is NaN."""
    return table.column(name).to_numpy().astype(np.float64)
