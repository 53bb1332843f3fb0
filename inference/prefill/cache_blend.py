"""Reuse of cached text wherever it stands in a prompt (CacheBlend, arXiv:2405.16444, section 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.paged_attention import PagedCache, SpanAttention, over_keys, rows_of
from inference.pages import chained
from inference.prefill.base import PrefillStrategy
from models.rope import turn

if TYPE_CHECKING:
    from inference.scheduler import Span

CHECK = 1  # the layer whose values say which tokens differ most from what the cache holds (section 4.3)
ASKED = 32  # last tokens of a prompt that are always computed


class CacheBlend(PrefillStrategy):
    """Takes the keys and values of text that the cache holds, whatever stood before it there, and computes of it only
    the ``budget`` whose values differ most, and all text that it does not hold.

    Text is found page by page at any place of the prompt, of requests of the same salt alone. Keys are turned to their
    new positions. The layers up to ``CHECK`` compute every token; there tokens are ordered by the square of the
    difference between new and cached values, and those chosen go on through the other layers. (The paper computes only
    keys and values of the check layer for all tokens, and chooses again in later layers.)
    """

    skips_rows = True

    def attention(self, cache: PagedCache, span: Span, dtype: torch.dtype) -> SpanAttention | None:
        if not span.generation.prefilling or span.count == 1:
            return None
        sources, shifts = self._sources(span)
        if not any(source >= 0 for source in sources):
            return None
        return _Blend(cache, span, dtype, torch.tensor(sources), torch.tensor(shifts), self)

    def _sources(self, span: Span) -> tuple[list[int], list[int]]:
        """For each token of a span the slot where the cache has it (-1: nowhere), and how far it moves."""
        pool, generation = self.around.pool, span.generation
        size, tokens = pool.page_tokens, generation.tokens
        sources, shifts = [-1] * span.count, [0] * span.count
        stop = span.start + span.count
        place = max(0, span.start - size + 1)
        while place < stop and place + size <= len(tokens):
            found = pool.find(chained(generation.salt, tokens[place : place + size]))
            if found is None:
                place += 1
                continue
            page, start = found
            for at in range(max(place, span.start), min(place + size, stop)):
                sources[at - span.start] = page * size + at - place
                shifts[at - span.start] = place - start
            place += size
        return sources, shifts


class _Blend(SpanAttention):
    """One chunk of a prompt, some of it from the cache."""

    def __init__(
        self, cache: PagedCache, span: Span, dtype: torch.dtype, source_S: Tensor, shift_S: Tensor, owner: CacheBlend
    ) -> None:
        super().__init__(cache.read(span.generation, span.place), span.count, None, dtype)
        self._cache, self._budget = cache, owner.budget
        slots = span.generation.slots(span.place, span.count, cache.page_tokens)
        self._slots_S, self._rows = torch.tensor(slots), torch.arange(span.count)
        self._reused, self._chosen = source_S >= 0, self._rows
        self._asked = span.generation.prompt_tokens - span.start - ASKED
        self._old_values = cache.store[CHECK, cache.kv_heads :].index_select(1, source_S[self._reused])
        self._fill(source_S[self._reused], turn(shift_S[self._reused], owner.around.frequencies))

    def _fill(self, source_R: Tensor, turn_RD: Tensor) -> None:
        """Put what the cache holds where the text will look for it, keys turned to their new positions."""
        heads, target_R = self._cache.kv_heads, self._slots_S[self._reused]
        for layer in self._cache.store[CHECK + 1 :].unbind(0):
            both = layer.index_select(1, source_R)
            keys = torch.view_as_complex(both[:heads].float().unflatten(2, (-1, 2))) * turn_RD
            both[:heads] = torch.view_as_real(keys).flatten(2).to(both.dtype)
            layer.index_copy_(1, target_R, both)

    def _choose(self, values_SKD: Tensor) -> None:
        """Which rows go on: what the cache did not have, the question, and the budget of what differs most."""
        reused = self._reused.nonzero()[:, 0]
        difference_R = (values_SKD.transpose(0, 1)[:, reused] - self._old_values).float().square().sum((0, 2))
        going = ~self._reused | (torch.arange(len(self._slots_S)) >= self._asked)
        going[reused[difference_R.topk(math.ceil(self._budget * len(reused))).indices]] = True
        self._chosen = going.nonzero()[:, 0]

    def __call__(self, layer: int, q_SKGD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
        """The rows that are still computed, over all of the chunk and what stands before it."""
        if layer == CHECK:
            self._choose(v_SKD)
        parts = self.over_past(layer, q_SKGD)
        if len(self._rows) == len(self._slots_S):
            parts.append(self.over_own(q_SKGD, k_SKD, v_SKD))
        else:
            both, heads = self._cache.store[layer].index_select(1, self._slots_S), self._cache.kv_heads
            parts.append(over_keys(q_SKGD, both[:heads], both[heads:], self._seen_ST))
        return rows_of(parts)

    def flow(self, layer: int, x_SE: Tensor) -> tuple[Tensor, list[int]] | None:
        """Behind the check layer only the chosen rows go on."""
        if layer != CHECK + 1 or len(self._chosen) == len(self._rows):
            return None
        self._rows = self._chosen
        self._seen_ST = torch.arange(len(self._slots_S)) <= self._rows[:, None]
        return x_SE[self._rows], self._rows.tolist()
