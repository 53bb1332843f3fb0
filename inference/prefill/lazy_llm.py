"""Prompts whose unimportant tokens are left behind from layer to layer (LazyLLM, arXiv:2407.14057, section 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.paged_attention import PagedCache, SpanAttention, over_keys, rows_of
from inference.prefill.base import EXACT, PrefillStrategy, Surroundings

if TYPE_CHECKING:
    from inference.scheduler import Span

STAGES = 4  # equal parts of the layers; between them tokens are left behind


class LazyLLM(PrefillStrategy):
    """At three depths only the tokens go on to which the text's last token pays most attention in the layer before.

    The share that goes on falls in equal steps to ``budget``. What is left behind waits with its hidden state (the
    paper's auxiliary cache): every later token chooses again, and what it wants is computed from where it stopped, so
    no layer computes a token twice. A prompt that is read in chunks is judged, in each, by its last token: it looks on.
    """

    skips_rows = True

    def __init__(self, around: Surroundings, budget: float, prompt_tokens: int) -> None:
        super().__init__(around, budget, prompt_tokens)
        layers = around.layers
        self.borders = sorted({max(1, round(layers * part / STAGES)) for part in range(1, STAGES)} & set(range(layers)))
        self.reset()

    def reset(self) -> None:
        # By border: which tokens have passed it, and the states of those that wait there [tokens, dim].
        self.passed: dict[int, Tensor] = {}
        self.waiting: dict[int, Tensor] = {}

    def share(self, border: int) -> float:
        """Of the tokens that go on behind a border."""
        return 1 - (1 - self.budget) * (self.borders.index(border) + 1) / len(self.borders)

    def chunk(self, pending: int, rows: int) -> tuple[int, int]:
        """The prompt's last token looks on at every chunk."""
        if pending <= rows or rows == 1:
            return min(pending, rows), 0
        return rows - 1, 1

    def attention(self, cache: PagedCache, span: Span, dtype: torch.dtype) -> SpanAttention | None:
        if self.budget == 1 or self.prompt_tokens <= EXACT:
            return None
        return _Lazy(cache, span, dtype, self)

    def grow(self, border: int, length: int, x_SE: Tensor) -> tuple[Tensor, Tensor]:
        """``passed`` and ``waiting`` of a border with room for ``length`` tokens."""
        if border not in self.passed:
            self.passed[border], self.waiting[border] = (
                torch.zeros(0, dtype=torch.bool),
                x_SE.new_zeros(0, x_SE.shape[1]),
            )
        missing = length - len(self.passed[border])
        if missing > 0:
            room = max(missing, length // 4)
            self.passed[border] = torch.nn.functional.pad(self.passed[border], (0, room))
            self.waiting[border] = torch.nn.functional.pad(self.waiting[border], (0, 0, 0, room))
        return self.passed[border], self.waiting[border]


class _Lazy(SpanAttention):
    """One pass of a text. ``_rows_S`` are the places of the rows in the text, ``_keys_T`` those of the tokens that they
    read, both in order; the last row judges."""

    def __init__(self, cache: PagedCache, span: Span, dtype: torch.dtype, owner: LazyLLM) -> None:
        super().__init__([], len(span.tokens), None, dtype)
        self._cache, self._span, self._owner = cache, span, owner
        self._stop = span.start + len(span.tokens)
        self._slots_T = torch.tensor(span.generation.slots(0, self._stop, cache.page_tokens))
        self._rows_S = torch.arange(span.start, self._stop)
        self._keys_T = torch.arange(self._stop)
        self._prompt = span.generation.prefilling
        self._weights_T = torch.empty(0)  # the last row's attention to the keys, summed over heads

    def __call__(self, layer: int, q_SKGD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
        heads = self._cache.kv_heads
        both = self._cache.store[layer].index_select(1, self._slots_T[self._keys_T])
        seen_ST = None if len(self._rows_S) == 1 else self._keys_T <= self._rows_S[:, None]
        if layer + 1 in self._owner.borders:
            logits_KGT = q_SKGD[-1] @ both[:heads].transpose(1, 2) * q_SKGD.shape[3] ** -0.5
            self._weights_T = logits_KGT.float().softmax(2).sum((0, 1))
        return rows_of([over_keys(q_SKGD, both[:heads], both[heads:], seen_ST)])

    def flow(self, layer: int, x_SE: Tensor) -> tuple[Tensor, list[int]] | None:
        """Who goes on behind a border: of a chunk the share that matters, of a text the share of all that it has."""
        if layer not in self._owner.borders:
            return None
        passed_T, waiting_TE = self._owner.grow(layer, self._stop, x_SE)
        waiting_TE[self._rows_S[:-1]] = x_SE[:-1]
        first = self._span.start if self._prompt else 0  # earlier tokens of a prompt have been judged
        old_T = self._keys_T[self._keys_T < first]
        young_T = self._keys_T[(self._keys_T >= first) & (self._keys_T < self._stop - 1)]
        most = self._span.count if self._prompt else self._stop
        count = min(len(young_T), math.ceil(self._owner.share(layer) * most))
        weights = self._weights_T[len(old_T) : len(old_T) + len(young_T)]
        chosen_T = young_T[weights.topk(count).indices.sort().values]
        new_T = chosen_T[~passed_T[chosen_T]]
        passed_T[new_T] = True
        passed_T[self._stop - 1] = self._span.probes == 0
        last = torch.tensor([self._stop - 1])
        self._keys_T = torch.cat((old_T[passed_T[old_T]], chosen_T, last))
        self._rows_S = torch.cat((new_T, last))
        return torch.cat((waiting_TE[new_T], x_SE[-1:])), (self._rows_S - self._span.start).tolist()
