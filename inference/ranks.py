"""One model over the ranks of a process group: long prompts are split over them, and so is the cache.

Of every page each rank holds an even part, a *stripe*, so that a text of any length lies evenly on all ranks and pages
are counted, shared and remembered as with one rank. Rank 0 decides what a pass computes and tells the others.

- A long chunk of a prompt: a rank computes the rows whose keys and values it stores. Attention is a strategy of
  sequence parallelism: keys travel (ring attention, arXiv:2310.01889) or queries do (TokenRing, arXiv:2412.20501),
  whichever sends fewer bytes: keys for a fresh prompt, queries for a chunk behind a long past.
- Few rows (tokens being generated, drafts, short chunks): every rank computes them all, attends over its own part of
  the past, and the partial results are merged everywhere (``parallel.decode``).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError, RankLost
from conf.serving import EngineConfig
from inference.gguf_files import model_folder
from inference.model_runner import ModelRunner, Result, load_runner, wanted_rows
from inference.paged_attention import PagedCache, Part, SpanAttention, Views, merged
from inference.scheduler import Span, depths
from models.spec import ModelSpec
from parallel.attention import attend
from parallel.decode import merge_over_ranks
from parallel.layout import Layout

SPLIT_ROWS = 32  # rows of a rank from which on a chunk is split: fewer cost each rank as much as all of them
STEP_TIMEOUT_SEC = 120.0  # in which every rank takes part in a pass
IDLE_TIMEOUT = timedelta(days=3650)  # between two passes


@dataclass(frozen=True)
class Stripes:
    """Which tokens of a text each rank holds: of every ``page`` tokens, rank ``r`` the ``r``-th of even parts."""

    page: int
    ranks: int

    @property
    def part(self) -> int:
        """Tokens of a page on one rank."""
        return self.page // self.ranks

    def layout(self, start: int, stop: int) -> Layout:
        """The positions of ``[start, stop)`` by rank."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.ranks)]
        for first in range(start // self.part * self.part, stop, self.part):
            found[first // self.part % self.ranks].append((max(first, start), min(first + self.part, stop)))
        return Layout.of(found)

    def count(self, length: int, rank: int) -> int:
        """How many of the first ``length`` tokens a rank holds."""
        return length // self.page * self.part + min(max(length % self.page - rank * self.part, 0), self.part)

    def place(self, slot: int, rank: int) -> int | None:
        """Where a rank keeps a token whose place in a whole cache would be ``slot``; None: another rank has it."""
        page, offset = divmod(slot, self.page)
        return page * self.part + offset % self.part if offset // self.part == rank else None


@dataclass(frozen=True)
class Piece:
    """One span of a pass, as every rank knows it."""

    start: int
    tokens: list[int]
    parents: list[int] | None
    runs: list[tuple[int, int]]  # of the text's pages
    wanted: int  # last rows that rank 0 needs

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @cached_property
    def pages(self) -> list[int]:
        return [page for first, behind in self.runs for page in range(first, behind)]


@dataclass(frozen=True)
class Plan:
    """What all ranks do next: compute ``pieces``, or move cached tokens, or stop."""

    pieces: list[Piece] = field(default_factory=list)
    move: tuple[list[int], list[int]] | None = None
    stop: bool = False


class StripedCache(PagedCache):
    """A rank's part of the cache, and a slot that takes what other ranks keep. ``mover`` moves tokens on all ranks."""

    def __init__(
        self,
        spec: ModelSpec,
        pages: int,
        stripes: Stripes,
        rank: int,
        dtype: torch.dtype,
        mover: Callable[[Tensor, Tensor], None],
    ) -> None:
        super().__init__(spec, pages * stripes.part + 1, stripes.page, dtype)
        self.stripes, self.rank, self._bin, self._mover = stripes, rank, pages * stripes.part, mover

    def move(self, source_T: Tensor, target_T: Tensor) -> None:
        self._mover(source_T, target_T)

    def local(self, slots: Sequence[int]) -> list[int]:
        """Places here of tokens whose places in a whole cache would be ``slots``."""
        found = (self.stripes.place(slot, self.rank) for slot in slots)
        return [self._bin if slot is None else slot for slot in found]

    def past(self, piece: Piece, length: int) -> list[Views]:
        """This rank's tokens among the first ``length`` of a text, in place, by runs of pages."""
        found, part = [], self.stripes.part
        for first, behind in piece.runs:
            whole = min(length, (behind - first) * self.page_tokens)
            count = self.stripes.count(whole, self.rank)
            length -= whole
            if count:
                view = self.store[:, :, first * part : first * part + count]
                keys, values = view[:, : self.kv_heads].unbind(0), view[:, self.kv_heads :].unbind(0)
                found.append(list(zip(keys, values, strict=True)))
        return found


class RankedRunner:
    """What a ``ModelRunner`` is to an engine, over all ranks of a group, with this rank's part of the cache.

    Rank 0 calls ``run``, ``close`` and the cache's ``move``; the others are in ``follow``. A failure on any rank ends
    all, with RankLost: a pass that one of them left half done cannot be taken up again.
    """

    def __init__(self, runner: ModelRunner, ranks: int, pages: int, page_tokens: int) -> None:
        join(ranks)
        self._runner, self.dtype = runner, runner.dtype
        group: Any = dist.group.WORLD
        plans: Any = dist.new_group(timeout=IDLE_TIMEOUT)  # a server may be idle for long
        self._group: dist.ProcessGroup = group
        self._plans: dist.ProcessGroup = plans
        self.rank = dist.get_rank()
        pages = int(self._shared(pages))
        stripes = Stripes(page_tokens, ranks)
        self.cache = StripedCache(runner.spec, pages, stripes, self.rank, runner.dtype, self._move_together)

    def run(self, spans: Sequence[Span], cache: PagedCache) -> Result:
        """``ModelRunner.run``; the cache is this object's own."""
        assert cache is self.cache, "every rank computes with the cache that it holds"
        pieces = [Piece(s.start, s.tokens, s.parents, s.generation.runs, wanted_rows(s)) for s in spans]
        return self._runner.results(spans, self._together(Plan(pieces)).split([len(span.tokens) for span in spans]))

    def _move_together(self, source_T: Tensor, target_T: Tensor) -> None:
        """Copy tokens to other places, which may be on other ranks, in all layers."""
        self._together(Plan(move=(source_T.tolist(), target_T.tolist())))

    def close(self) -> None:
        """Let the other ranks end."""
        self._together(Plan(stop=True))

    def follow(self) -> None:
        """Do what rank 0 says until it closes."""
        while not (plan := self._shared(None)).stop:
            self._do(plan)

    def _together(self, plan: Plan) -> Tensor:
        try:
            self._shared(plan)
            return self._do(plan)
        except Exception as error:
            rule = "the ranks of a model are in the middle of different passes"
            raise RankLost(
                "engine.ranks", dist.get_world_size(), f"{rule}: {error}", "start the server again"
            ) from error

    def _shared(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._plans)
        return box[0]

    @torch.inference_mode()
    def _do(self, plan: Plan) -> Tensor:
        if plan.move is not None:
            self._move(*plan.move)
        return self._compute(plan.pieces) if plan.pieces else torch.empty(0)

    def _compute(self, pieces: Sequence[Piece]) -> Tensor:
        """This rank's rows through the layers; on rank 0 all rows, zeros where nobody wants them."""
        step = _StripedAttention(pieces, self.cache, self._group, self.dtype)
        tokens, positions, slots = [], [], []
        size = self.cache.page_tokens
        for piece, layout in zip(pieces, step.layouts, strict=True):
            where = depths(piece.start, len(piece.tokens), piece.parents)
            rows = range(len(piece.tokens)) if layout is None else (layout.positions(self.rank) - piece.start).tolist()
            tokens += [piece.tokens[row] for row in rows]
            positions += [where[row] for row in rows]
            places = (piece.start + row for row in rows)
            slots += [piece.pages[place // size] * size + place % size for place in places]
        x_TE = self._runner.forward(tokens, positions, self.cache.local(slots), step, self.cache)
        return self._collect(pieces, step, x_TE)

    def _collect(self, pieces: Sequence[Piece], step: "_StripedAttention", x_TE: Tensor) -> Tensor:
        whole = []
        for piece, layout, own_SE in zip(pieces, step.layouts, x_TE.split(step.sizes), strict=True):
            if layout is None:
                whole.append(own_SE)
                continue
            rows_SE = x_TE.new_zeros(len(piece.tokens), x_TE.shape[1])
            if piece.wanted:
                wanted = self.cache.stripes.layout(piece.stop - piece.wanted, piece.stop)
                padded = x_TE.new_zeros(max(wanted.lengths), x_TE.shape[1])
                padded[: wanted.lengths[self.rank]] = own_SE[len(own_SE) - wanted.lengths[self.rank] :]
                parts = [torch.empty_like(padded) for _ in wanted.ranks]
                dist.all_gather(parts, padded, group=self._group)
                held = [part[:length] for part, length in zip(parts, wanted.lengths, strict=True)]
                rows_SE[-piece.wanted :] = wanted.unshard(held, 0)
            whole.append(rows_SE)
        return torch.cat(whole)

    def _move(self, source: list[int], target: list[int]) -> None:
        store, places = self.cache.store, [self.cache.stripes.place(slot, self.rank) for slot in source]
        moved = store.new_zeros(*store.shape[:2], len(source), store.shape[3])
        for index, place in enumerate(places):
            if place is not None:
                moved[:, :, index] = store[:, :, place]
        dist.all_reduce(moved, group=self._group)  # one rank has each token, the others add zeros
        store.index_copy_(2, torch.tensor(self.cache.local(target)), moved)


class _StripedAttention:
    """The attention of one pass's rows on this rank, in every layer."""

    def __init__(
        self, pieces: Sequence[Piece], cache: StripedCache, group: dist.ProcessGroup, dtype: torch.dtype
    ) -> None:
        self._pieces, self._cache, self._group = pieces, cache, group
        stripes = cache.stripes
        self.layouts: list[Layout | None] = []  # None: every rank computes all of its rows
        self._keys: list[Layout | None] = []
        self._spans: list[SpanAttention] = []
        for piece in pieces:
            rows = len(piece.tokens)
            split = piece.parents is None and rows >= max(SPLIT_ROWS * stripes.ranks, stripes.page)
            self.layouts.append(stripes.layout(piece.start, piece.stop) if split else None)
            self._keys.append(stripes.layout(0, piece.stop) if split else None)
            past = cache.past(piece, piece.stop if split else piece.start)
            self._spans.append(SpanAttention(past, rows, piece.parents, dtype))
        self.sizes = [
            len(piece.tokens) if layout is None else layout.lengths[cache.rank]
            for piece, layout in zip(pieces, self.layouts, strict=True)
        ]

    def __call__(self, layer: int, q_TKGD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        outs: list[Tensor] = []
        pasts: list[tuple[int, Part]] = []
        rows = [x.split(self.sizes) for x in (q_TKGD, k_TKD, v_TKD)]
        for index, q in enumerate(rows[0]):
            if self.layouts[index] is not None:
                outs.append(self._split(index, layer, q))
                continue
            outs.append(torch.empty(0))
            pasts.append((index, _over_nothing(q)))
            parts = self._spans[index].over_past(layer, q)
            if parts:
                pasts[-1] = (index, parts[0] if len(parts) == 1 else merged(parts))
        for index, past in self._merged(pasts):
            own = self._spans[index].over_own(*(x[index] for x in rows))
            out_KGSD, _ = merged([past, own])
            outs[index] = out_KGSD.permute(2, 0, 1, 3).flatten(1)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _merged(self, pasts: Sequence[tuple[int, Part]]) -> list[tuple[int, Part]]:
        """The rows' attention over all ranks' pasts, in one message."""
        if not any(self._pieces[index].start for index, _ in pasts):
            return list(pasts)
        sizes = [out.shape[2] for _, (out, _) in pasts]
        out, lse = (torch.cat([part[which] for _, part in pasts], 2) for which in (0, 1))
        out, lse = merge_over_ranks(out.float(), lse[..., 0], self._group)
        parts = zip(pasts, out.split(sizes, 2), lse[..., None].split(sizes, 2), strict=True)
        return [(index, (out, lse)) for (index, _), out, lse in parts]

    def _split(self, index: int, layer: int, q_SKGD: Tensor) -> Tensor:
        """A chunk's own rows over all keys up to its end, by the strategy that sends fewer bytes."""
        views = self._spans[index].past(layer, q_SKGD)
        keys, values = (torch.cat([view[which] for view in views], 1).transpose(0, 1)[None] for which in (0, 1))
        queries, held = self.layouts[index], self._keys[index]
        assert queries is not None, "the piece is split"
        assert held is not None, "the piece is split"
        kv_heads, group, width = q_SKGD.shape[1:]
        strategy = cheaper_strategy(
            len(self._pieces[index].tokens), held.bounds.stop, kv_heads * group, kv_heads, width
        )
        out = attend(
            q_SKGD.flatten(1, 2)[None],
            keys,
            values,
            group=self._group,
            strategy=strategy,
            layout=queries,
            key_layout=held,
            timeout=STEP_TIMEOUT_SEC,
        )
        return out[0].flatten(1)


def cheaper_strategy(queries: int, keys: int, heads: int, kv_heads: int, width: int) -> str:
    """Which moves fewer bytes over all hops: keys and values, or queries out and results with their lse back."""
    return "ring" if 2 * kv_heads * width * keys <= (2 * width + 1) * heads * queries else "token_ring"


def _over_nothing(q_SKGD: Tensor) -> Part:
    rows, kv_heads, group, width = q_SKGD.shape
    return q_SKGD.new_zeros(kv_heads, group, rows, width), q_SKGD.new_full((kv_heads, group, rows, 1), -torch.inf)


def place(
    runner: ModelRunner, ranks: int, pages: int, page_tokens: int
) -> tuple[ModelRunner | RankedRunner, PagedCache]:
    """What an engine computes with, and the cache: one process's own, or those of rank 0 of several."""
    if ranks == 1:
        return runner, PagedCache(runner.spec, pages * page_tokens, page_tokens, runner.dtype)
    ranked = RankedRunner(runner, ranks, pages, page_tokens)
    return ranked, ranked.cache


def join(ranks: int) -> None:
    """Meet the other ranks, as the environment says (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Raises ConfigError where the process was not started as one of ``ranks``.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) != ranks:
            rule = "an engine of several ranks runs in as many processes"
            raise ConfigError("engine.ranks", ranks, rule, "sundog serve or sundog generate --prompt, which start them")
        dist.init_process_group("gloo", timeout=timedelta(seconds=STEP_TIMEOUT_SEC))
    if dist.get_world_size() != ranks:
        rule = f"the process group has {dist.get_world_size()} ranks"
        raise ConfigError("engine.ranks", ranks, rule, "set it to that")


def follow(config: dict[str, Any], control: Any = None) -> None:
    """A rank other than 0: load ``config["model"]`` and compute with rank 0's engine until that closes."""
    settings = EngineConfig(**config["engine"])
    runner = load_runner(model_folder(config["model"]), settings)
    RankedRunner(runner, settings.ranks, 0, settings.page_tokens * settings.ranks).follow()
