"""Attention of the rows of one step over a paged cache, each text over its own tokens.

A text's earlier tokens lie in runs of adjacent pages that are read in place; every run is attended to by itself and the
results are merged by their log-sum-exp (FlashAttention-2, arXiv:2307.08691, section 3.1), so that neither copies nor
masks over the past are made. Only the rows of the step need a mask among themselves: causal, or a draft's ancestors.
Grouped queries (arXiv:2305.13245) that read the same keys are rows of one product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.few_rows import FEW_ROWS, SHORT, Array, Reach, Reaches
from inference.generation import MAX_RUNS, Generation
from inference.policies.base import KVPolicy
from inference.scheduler import Span
from models.spec import ModelSpec

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Views = Sequence[tuple[Tensor, Tensor]]  # by layer: keys and values [kv_heads, tokens, D]
Part = tuple[Tensor, Tensor]  # attention over some keys, [kv_heads, group, rows, D], and its log-sum-exp [.., rows, 1]


class PagedCache:
    """Keys (already rotated) and values of all layers, [layers, 2 kv_heads, slots, D]; memory comes with use."""

    def __init__(self, spec: ModelSpec, slots: int, page_tokens: int, dtype: torch.dtype) -> None:
        self.kv_heads, self.page_tokens = spec.kv_heads, page_tokens
        self.store = torch.empty(spec.layers, 2 * spec.kv_heads, slots, spec.head_dim, dtype=dtype)
        self._layers = self.store.unbind(0)
        self._arrays = [layer.numpy() for layer in self._layers] if dtype == torch.float32 else []

    @property
    def compiled(self) -> bool:
        """Whether compiled loops can work on it: they have no bf16."""
        return bool(self._arrays)

    def array(self, layer: int) -> Array:
        """A layer's keys and values for them, [2 kv_heads, slots, D]."""
        return self._arrays[layer]

    def write(self, layer: int, slots_T: Tensor, kv_TKD: Tensor) -> None:
        """Put keys and values, [rows, 2 kv_heads, D], where they belong."""
        self._layers[layer].index_copy_(1, slots_T, kv_TKD.transpose(0, 1))

    def move(self, source_T: Tensor, target_T: Tensor) -> None:
        """Copy tokens to other slots, in all layers."""
        self.store.index_copy_(2, target_T, self.store.index_select(2, source_T))

    @torch.inference_mode()
    def evict(self, generation: Generation, count: int) -> list[int]:
        """Let a text's policy compress what the cache holds of it to ``count`` tokens; returns the free pages."""
        policy, held = generation.policy, generation.held
        assert policy is not None
        if held > count:
            slots = torch.tensor(generation.slots(0, held, self.page_tokens))
            for layer, store in enumerate(self._layers):
                both = store.index_select(1, slots)
                kept = policy.compress(layer, both[: self.kv_heads], both[self.kv_heads :], count)
                store.index_copy_(1, slots[:count], torch.cat(kept))
            generation.evicted += held - count
        return generation.trim_pages(-(-generation.held // self.page_tokens))

    def read(self, generation: Generation, length: int) -> list[Views]:
        """The first ``length`` tokens of a text: a few runs in place, or a copy where there are too many."""
        spans = generation.spans(length, self.page_tokens)
        if len(spans) > MAX_RUNS:
            slots = torch.cat([torch.arange(start, end) for start, end in spans])
            return [_Gathered(self._layers, slots, self.kv_heads)]
        runs = []
        for start, end in spans:
            view = self.store[:, :, start:end]
            keys, values = view[:, : self.kv_heads].unbind(0), view[:, self.kv_heads :].unbind(0)
            runs.append(list(zip(keys, values, strict=True)))
        return runs


class _Gathered(Sequence):
    """Scattered tokens, copied together one layer at a time."""

    def __init__(self, layers: Sequence[Tensor], slots: Tensor, kv_heads: int) -> None:
        self._layers, self._slots, self._kv_heads = layers, slots, kv_heads

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer):
        both = self._layers[layer].index_select(1, self._slots)
        return both[: self._kv_heads], both[self._kv_heads :]


@dataclass
class Rows:
    """What a layer computes: states [rows, dim], and each row's token, position and slot in the cache."""

    x_TE: Tensor
    tokens: list[int]
    positions: list[int]
    slots: list[int]


class StepAttention:
    """The attention of all rows of a step, each text over its own tokens."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span], dtype: torch.dtype) -> None:
        self.sizes = [len(span.tokens) for span in spans]
        self._told = [(span, list(range(len(span.tokens)))) for span in spans]
        self._spans: list[SpanAttention | None] = []
        self._cache, self._page_tokens = cache, cache.page_tokens
        reaches: list[Reach] = []
        first = looped = 0
        fixed = cache.compiled and all(span.generation.prefill is None for span in spans)
        for span, rows in zip(spans, self.sizes, strict=True):
            first += rows
            if fixed and looped + rows <= FEW_ROWS and _is_short(span):
                looped += rows
                reaches += _reaches(span, first - rows, cache.page_tokens)
                self._spans.append(None)
                continue
            prefill = span.generation.prefill
            if prefill is not None and (attention := prefill.attention(cache, span, dtype)) is not None:
                self._spans.append(attention)
                continue
            # A single row's own token has been written and is read with the others.
            past, policy = cache.read(span.generation, span.place + int(rows == 1)), span.generation.policy
            if policy is None:
                self._spans.append(SpanAttention(past, rows, span.parents, dtype))
            else:
                self._spans.append(PolicyAttention(past, policy, span.place + span.count, dtype))
        self._some = Reaches(reaches) if reaches else None
        self.short = self._some if all(attention is None for attention in self._spans) else None  # all rows are in it

    def __call__(self, layer: int, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Queries [rows, kv_heads, group, D], keys and values [rows, kv_heads, D]; returns [rows, heads * D]."""
        if self._some is not None:
            return self._beside_short(self._some, layer, q_TKGD, k_TKD, v_TKD)
        if len(self._spans) == 1 and self._spans[0] is not None:
            return self._spans[0](layer, q_TKGD, k_TKD, v_TKD)
        rows = (x.split(self.sizes) for x in (q_TKGD, k_TKD, v_TKD))
        parts = zip(self._spans, *rows, strict=True)
        return torch.cat([attend(layer, q, k, v) for attend, q, k, v in parts if attend is not None])

    def _beside_short(self, short: Reaches, layer: int, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Short texts in one loop, the others each by itself."""
        out_TN = q_TKGD.new_empty(q_TKGD.shape[0], q_TKGD.shape[1:].numel())
        short.attend(q_TKGD, self._cache.array(layer), out_TN)
        first = 0
        for attend, rows in zip(self._spans, self.sizes, strict=True):
            if attend is not None:
                mine = slice(first, first + rows)
                out_TN[mine] = attend(layer, q_TKGD[mine], k_TKD[mine], v_TKD[mine])
            first += rows
        return out_TN

    def flow(self, layer: int, x_TE: Tensor) -> Rows | None:
        """The rows that a layer computes where a strategy changes them; None: those of the layer before."""
        parts = list(x_TE.split(self.sizes))
        changed = False
        for index, (attention, x_SE) in enumerate(zip(self._spans, parts, strict=True)):
            if attention is not None and (moved := attention.flow(layer, x_SE)) is not None:
                parts[index], offsets = moved
                self._told[index] = (self._told[index][0], offsets)
                changed = True
        if not changed:
            return None
        self.sizes = [len(part) for part in parts]
        found = Rows(torch.cat(parts), [], [], [])
        for span, offsets in self._told:
            tokens, first = span.generation.tokens, span.start
            slots = span.generation.slots(0, span.place + len(span.tokens), self._page_tokens)
            positions = span.positions
            found.tokens += [span.tokens[at] if at >= 0 else tokens[first + at] for at in offsets]
            found.positions += [positions[at] if at >= 0 else first + at for at in offsets]
            found.slots += [slots[span.place + at] for at in offsets]
        return found


def _is_short(span: Span) -> bool:
    """Whether the span is a few rows, one behind the other, of a short text of which everything is kept and read."""
    chain = span.parents is None or span.parents == list(range(-1, len(span.tokens) - 1))
    whole = span.generation.policy is None and span.generation.prefill is None
    return whole and chain and span.place + len(span.tokens) <= SHORT


def _reaches(span: Span, first: int, page_tokens: int) -> list[Reach]:
    """What each row of a chain sees: the text's tokens up to its own."""
    found = []
    for row in range(len(span.tokens)):
        runs = span.generation.spans(span.place + row + 1, page_tokens)
        found += [(first + row, start, end) for start, end in runs]
    return found


class SpanAttention:
    """The attention of one span in every layer; what does not depend on the layer is prepared once."""

    def __init__(self, past: Sequence[Views], rows: int, parents: Sequence[int] | None, dtype: torch.dtype) -> None:
        self._past, self._mask = past, None
        if parents is not None and rows > 1:
            self._mask = torch.zeros(rows, rows, dtype=dtype)
            self._mask.masked_fill_(~ancestors(parents), -torch.inf)

    def __call__(self, layer: int, q_SKGD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
        """Queries [rows, kv_heads, group, D] over the past and the step's own keys and values; [rows, heads * D]."""
        parts = self.over_past(layer, q_SKGD)
        if len(q_SKGD) > 1:
            parts.append(self.over_own(q_SKGD, k_SKD, v_SKD))
        return rows_of(parts)

    def over_past(self, layer: int, q_SKGD: Tensor) -> list[Part]:
        """For each run of earlier tokens what the queries get of it."""
        rows, kv_heads, group, width = q_SKGD.shape
        q_KND = q_SKGD.permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, width)
        parts = []
        for keys, values in self.past(layer, q_SKGD):
            out, lse = flash(q_KND, keys[None], values[None], 0.0, False)
            parts.append((out.view(kv_heads, group, rows, width), lse.view(kv_heads, group, rows, 1)))
        return parts

    def flow(self, layer: int, x_SE: Tensor) -> tuple[Tensor, list[int]] | None:
        """The rows that go into a layer where they change: states, and each one's offset from the span's first token,
        negative for earlier tokens of the text; None: they stay."""
        return None

    def past(self, layer: int, q_SKGD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the earlier tokens, in runs."""
        return [run[layer] for run in self._past]

    def over_own(self, q_SKGD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Part:
        """What the queries get of each other's tokens: causal, or a draft's ancestors."""
        q_KGSD = q_SKGD.permute(1, 2, 0, 3)
        keys, values = (x.transpose(0, 1)[:, None].expand(q_KGSD.shape) for x in (k_SKD, v_SKD))
        out, lse = flash(q_KGSD, keys, values, 0.0, self._mask is None, attn_mask=self._mask)
        return out, lse[..., None]


class PolicyAttention(SpanAttention):
    """Attention under a key-value policy, after which the cache holds ``written`` tokens of the text."""

    def __init__(self, past: Sequence[Views], policy: KVPolicy, written: int, dtype: torch.dtype) -> None:
        super().__init__(past, 1, None, dtype)
        self._policy, self._written = policy, written

    def __call__(self, layer: int, q_SKGD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
        """As without a policy; the policy sees the logits if it wants them."""
        if self._policy.scores:
            self._policy.observe(layer, self._logits(layer, q_SKGD, k_SKD), self._written)
        return super().__call__(layer, q_SKGD, k_SKD, v_SKD)

    def past(self, layer: int, q_SKGD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The tokens that the policy selects, copied together; else all."""
        runs = super().past(layer, q_SKGD)
        if not (self._policy.selects and runs):
            return runs
        chosen = self._policy.select(layer, q_SKGD, [keys for keys, _ in runs])
        if chosen is None:
            return runs
        return [(picked([keys for keys, _ in runs], chosen), picked([values for _, values in runs], chosen))]

    def _logits(self, layer: int, q_SKGD: Tensor, k_SKD: Tensor) -> Tensor:
        """Attention logits of the rows over all that they could see, -inf where one could not, [K, G, S, T]."""
        q_KGSD = q_SKGD.permute(1, 2, 0, 3)
        rows, keys = q_KGSD.shape[2], [keys for keys, _ in super().past(layer, q_SKGD)]
        if rows > 1:
            keys.append(k_SKD.transpose(0, 1))
        flat = q_KGSD.flatten(1, 2)
        logits = torch.cat([(flat @ part.transpose(1, 2)).float() for part in keys], 2)
        logits = logits.unflatten(1, q_KGSD.shape[1:3]).mul_(q_KGSD.shape[3] ** -0.5)
        if rows > 1:
            logits[..., -rows:] += torch.full((rows, rows), -torch.inf).triu(1)
        return logits


def rows_of(parts: Sequence[Part]) -> Tensor:
    """The merged attention of rows over several sets of keys, [rows, heads * D]."""
    out_KGSD = parts[0][0] if len(parts) == 1 else merged(parts)[0]
    return out_KGSD.permute(2, 0, 1, 3).flatten(1)


def over_keys(q_SKGD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, seen_ST: Tensor | None) -> Part:
    """What queries get of keys and values [kv_heads, tokens, D], each row of those that ``seen_ST`` says; None: all."""
    q_KGSD = q_SKGD.permute(1, 2, 0, 3)
    keys, values = (x[:, None].expand(*q_KGSD.shape[:2], -1, -1) for x in (keys_KTD, values_KTD))
    mask = None
    if seen_ST is not None:
        mask = torch.zeros(seen_ST.shape, dtype=q_SKGD.dtype).masked_fill_(~seen_ST, -torch.inf)
    out, lse = flash(q_KGSD, keys, values, 0.0, False, attn_mask=mask)
    return out, lse[..., None]


def picked(runs: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Rows of [kv_heads, tokens, D] in runs by indices [n] or [kv_heads, n], copied together."""
    whole = runs[0] if len(runs) == 1 else torch.cat(list(runs), 1)
    if chosen.ndim == 1:
        return whole.index_select(1, chosen)
    return whole.gather(1, chosen[..., None].expand(-1, -1, whole.shape[2]))


def ancestors(parents: Sequence[int]) -> Tensor:
    """Which tokens of a draft each one sees: itself and what is above it, bool [tokens, tokens]."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            seen[token] |= seen[parent]
    return seen


def merged(parts: Sequence[Part]) -> Part:
    """Attention over several disjoint sets of keys from the attention over each."""
    lses = torch.stack([lse for _, lse in parts])
    outs = torch.stack([out for out, _ in parts])
    return (outs * lses.softmax(0)).sum(0).to(outs.dtype), lses.logsumexp(0)
