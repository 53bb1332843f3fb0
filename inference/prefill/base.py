"""What a prefill strategy is: it computes a prompt with fewer rows, or lets its rows read fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from inference.pages import PagePool

if TYPE_CHECKING:
    from inference.paged_attention import PagedCache, SpanAttention
    from inference.scheduler import Span

EXACT = 64  # prompts up to this length are computed exactly


@dataclass(frozen=True)
class Surroundings:
    """What a strategy works in: layers of the model, radians per position of its feature pairs, the cache's pages."""

    layers: int
    frequencies: Tensor
    pool: PagePool


class PrefillStrategy:
    """The state of one text. ``budget`` is the share of its prompt that is computed or read, 1 all of it.

    At budget 1 outputs are those of plain computing, token for token.
    """

    skips_rows: ClassVar[bool] = False  # not every token of the prompt passes all layers

    def __init__(self, around: Surroundings, budget: float, prompt_tokens: int) -> None:
        self.around, self.budget, self.prompt_tokens = around, budget, prompt_tokens

    def reset(self) -> None:
        """The cache has been emptied; the text will be computed again."""

    def chunk(self, pending: int, rows: int) -> tuple[int, int]:
        """How many of ``pending`` prompt tokens the next pass computes, in at most ``rows`` rows, and how many of the
        prompt's last tokens look on."""
        return min(pending, rows), 0

    def attention(self, cache: PagedCache, span: Span, dtype: torch.dtype) -> SpanAttention | None:
        """How a span of the text is computed; None: plainly."""
        raise AssertionError("every strategy says how")
