"""Prompts that read parts of a long past, by patterns of attention (MInference 1.0, arXiv:2407.02490, section 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.paged_attention import PagedCache, Part, SpanAttention, flash
from inference.prefill.base import PrefillStrategy

if TYPE_CHECKING:
    from inference.scheduler import Span

BLOCK = 64  # tokens that are read or left out together, and rows that read the same ones
JUDGES = 64  # last rows of a chunk whose attention to the past says what matters


class MInference(PrefillStrategy):
    """Rows of a prompt read the ``budget`` of the blocks of tokens that stand before their chunk.

    Three patterns choose them: *A-shape*, the first block and the nearest ones; *vertical-slash*, half by the attention
    of the chunk's last rows to each block and half by that to each distance; *block-sparse*, by mean queries and mean
    keys. Every key-value head takes the pattern that holds most of the attention of the chunk's last rows, anew in
    every chunk (the paper searches once, offline, for each query head, and takes single columns). The first and the
    nearest block are always read, and so is all of the chunk. Generated tokens read everything.
    """

    def attention(self, cache: PagedCache, span: Span, dtype: torch.dtype) -> SpanAttention | None:
        if not span.generation.prefilling or span.count == 1:
            return None
        return _Sparse(cache, span, dtype, self.budget)


class _Sparse(SpanAttention):
    """One chunk of a prompt behind a past of which it reads some blocks."""

    def __init__(self, cache: PagedCache, span: Span, dtype: torch.dtype, budget: float) -> None:
        super().__init__(cache.read(span.generation, span.place), span.count, None, dtype)
        self._blocks = span.place // BLOCK
        self._count = max(2, math.ceil(budget * self._blocks))

    def over_past(self, layer: int, q_SKGD: Tensor) -> list[Part]:
        """The whole blocks of the past by pattern, and what is left behind them."""
        if self._count >= self._blocks:
            return super().over_past(layer, q_SKGD)
        runs = self.past(layer, q_SKGD)
        keys, values = (torch.cat(list(parts), 1) if len(runs) > 1 else parts[0] for parts in zip(*runs, strict=True))
        whole = self._blocks * BLOCK
        rows, kv_heads, group, width = q_SKGD.shape
        padded = F.pad(q_SKGD, (0, 0, 0, 0, 0, 0, 0, -rows % BLOCK))
        q_KRGbD = padded.unflatten(0, (-1, BLOCK)).permute(2, 0, 3, 1, 4)
        chosen_KRn = self.choose(q_SKGD, keys[:, :whole])
        near = [x[:, :whole].unflatten(1, (-1, BLOCK)) for x in (keys, values)]
        each_K = torch.arange(kv_heads)[:, None, None]
        read = [x[each_K, chosen_KRn].flatten(2, 3).flatten(0, 1)[None] for x in near]
        out, lse = flash(q_KRGbD.flatten(2, 3).flatten(0, 1)[None], *read, 0.0, False)
        out = out.view(kv_heads, -1, group, BLOCK, width).transpose(1, 2).flatten(2, 3)[:, :, :rows]
        lse = lse.view(kv_heads, -1, group, BLOCK, 1).transpose(1, 2).flatten(2, 3)[:, :, :rows]
        parts = [(out, lse)]
        if keys.shape[1] > whole:
            q_KND = q_SKGD.permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, width)
            out, lse = flash(q_KND, keys[None, :, whole:], values[None, :, whole:], 0.0, False)
            parts.append((out.view(kv_heads, group, rows, width), lse.view(kv_heads, group, rows, 1)))
        return parts

    def choose(self, q_SKGD: Tensor, keys_KTD: Tensor) -> Tensor:
        """The blocks that each head's rows read, [kv_heads, blocks of rows, count]."""
        scale, rows = q_SKGD.shape[3] ** -0.5, len(q_SKGD)
        judges_KGED = q_SKGD[-JUDGES:].permute(1, 2, 0, 3)
        logits_KGET = judges_KGED @ keys_KTD[:, None].transpose(2, 3)
        attention_KET = (logits_KGET.float() * scale).softmax(3).sum(1)
        vertical_KB = attention_KET.sum(1).unflatten(1, (-1, BLOCK)).sum(2)
        parts = -(-rows // BLOCK)
        patterns = torch.stack(
            (
                self._a_shape(parts).expand(len(vertical_KB), -1, -1),
                self._vertical_slash(vertical_KB, attention_KET, rows),
                self._block_sparse(q_SKGD, keys_KTD),
            )
        )
        held_PK = vertical_KB[None].expand(3, -1, -1).gather(2, patterns[:, :, -1]).sum(2)
        best_K = held_PK.argmax(0)
        return patterns[best_K, torch.arange(len(best_K))]

    def _top(self, score_KRB: Tensor) -> Tensor:
        """The first and the nearest block, and the best of the others."""
        score_KRB = score_KRB.clone()
        score_KRB[..., 0] = score_KRB[..., -1] = torch.inf
        return score_KRB.topk(self._count, 2).indices

    def _a_shape(self, parts: int) -> Tensor:
        return self._top(torch.arange(self._blocks, dtype=torch.float32).expand(1, parts, -1))

    def _vertical_slash(self, vertical_KB: Tensor, attention_KET: Tensor, rows: int) -> Tensor:
        heads, judges, tokens = attention_KET.shape
        by_distance = attention_KET.new_zeros(heads, tokens + rows)
        place_E = tokens + rows - judges + torch.arange(judges)  # as if the chunk began right behind the whole blocks
        distance_ET = place_E[:, None] - torch.arange(tokens)
        by_distance.index_add_(1, distance_ET.flatten(), attention_KET.flatten(1))
        sums = F.pad(by_distance.cumsum(1), (1, 0))
        starts_R = tokens + torch.arange(0, rows, BLOCK)
        apart_RB = starts_R[:, None] - torch.arange(0, tokens, BLOCK)  # from block of rows to block of tokens
        low, high = (apart_RB - BLOCK + 1).clamp_min(0), (apart_RB + BLOCK).clamp_max(tokens + rows)
        slash_KRB = sums[:, high] - sums[:, low]
        upright = (self._count - 2) // 2 + 2
        vertical_KB = vertical_KB.clone()
        vertical_KB[:, 0] = vertical_KB[:, -1] = torch.inf
        vertical_Kn = vertical_KB.topk(upright, 1).indices
        vertical_KRn = vertical_Kn[:, None].expand(-1, len(starts_R), -1)
        slash_KRB = slash_KRB.scatter(2, vertical_KRn, -torch.inf)
        return torch.cat((vertical_KRn, slash_KRB.topk(self._count - upright, 2).indices), 2)

    def _block_sparse(self, q_SKGD: Tensor, keys_KTD: Tensor) -> Tensor:
        rows = len(q_SKGD)
        queries = F.pad(q_SKGD.float().mean(2), (0, 0, 0, 0, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK)).mean(1)
        means_KBD = keys_KTD.float().unflatten(1, (-1, BLOCK)).mean(2)
        return self._top(queries.transpose(0, 1) @ means_KBD.transpose(1, 2))
