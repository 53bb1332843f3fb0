"""Plans of windows: every token once, in pieces as few as promised; segments as the loader reads them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import IGNORE, Loader
from data.manifest import Manifest, write_manifest
from data.pack import partly_unsorted
from data.packing import CUTS, PADDING, QUARTER, SOFT, WAIT, WHOLE, Prices, _fill, cut_documents, plan
from data.shards import open_shards, shard_names, write_shard
from data.stages import record_files

MODES = ("concat", "soft", "whole")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=60), st.integers(1, 40), st.sampled_from(MODES))
def test_every_token_once_and_windows_never_too_full(lengths: list[int], context: int, packing: str) -> None:
    pieces = plan(np.array(lengths, dtype=np.int64), context, packing)
    taken: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for document, offset, count, _ in pieces.tolist():
        assert count > 0
        taken[document].append((offset, count))
    for length, parts in zip(lengths, taken, strict=True):
        assert [offset for offset, _ in parts] == list(np.cumsum([0, *(n for _, n in parts)])[:-1])
        assert sum(n for _, n in parts) == length
        least = -(-length // context)
        if packing == "whole" or (packing == "soft" and length * QUARTER < context):
            assert len(parts) <= max(1, least)
        assert len(parts) <= least + 1
    fill = np.bincount(pieces[:, 3], weights=pieces[:, 2])
    assert np.all(np.diff(pieces[:, 3]) >= 0)
    assert np.all(fill <= context)
    assert np.all(fill > 0)
    if packing == "concat":
        assert np.all(fill[:-1] == context)
        assert np.all(np.diff(pieces[:, 0]) >= 0)


def test_soft_packing_keeps_its_promises_on_text_like_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.5, 1.6, 4000), 20, 80_000).astype(np.int64)
    for context in (8192, 32768):
        concat, soft = (plan(lengths, context, packing) for packing in ("concat", "soft"))
        assert cut_documents(soft, lengths, context) <= CUTS * cut_documents(concat, lengths, context)
        assert 1 - lengths.sum() / ((soft[-1, 3] + 1) * context) <= PADDING
        places = np.unique(soft[:, 0], return_index=True)[1]
        assert np.mean(np.abs(np.argsort(np.argsort(places)) - np.arange(4000))) <= 1


def cheapest(sizes: list[int], fitting: int, room: int, context: int, whole: bool, prices: Prices) -> float:
    """The price of the best end of a window, over all subsets."""
    best = np.inf
    for subset in itertools.product((False, True), repeat=len(sizes)):
        left = room - sum(size for size, taken in zip(sizes, subset, strict=True) if taken)
        if left < 0:
            continue
        waits = sum(WAIT * (fitting - place) for place in range(fitting) if not subset[place])
        price = waits + sum(prices.early * (p - fitting + 1) for p in range(fitting, len(sizes)) if subset[p])
        best = min(best, price + prices.padded * left / context)
        for place, size in enumerate(sizes):
            if subset[place] or not 0 < left < size:
                continue
            needless = 1 + -(-(size - left) // context) > -(-size // context)
            moved = -WAIT * (fitting - place) if place < fitting else prices.early * (place - fitting + 1)
            if not needless or (not whole and size * QUARTER >= context):
                best = min(best, price + moved + prices.cut * needless)
    return best


def price_of(
    choice: tuple[int, int], sizes: list[int], fitting: int, room: int, context: int, whole: bool, prices: Prices
) -> float:
    """The price of a choice of ``_fill``; every document taken fits, and the one that is cut may be."""
    mask, cut = choice
    taken = [bool(mask >> place & 1) for place in range(len(sizes))]
    left = room - sum(size for size, yes in zip(sizes, taken, strict=True) if yes)
    assert left >= 0
    inside = [yes or place == cut for place, yes in enumerate(taken)]
    price = sum(WAIT * (fitting - p) for p in range(fitting) if not inside[p])
    price += sum(prices.early * (p - fitting + 1) for p in range(fitting, len(sizes)) if inside[p])
    if cut < 0:
        return price + prices.padded * left / context
    assert not taken[cut]
    assert 0 < left < sizes[cut]
    needless = 1 + -(-(sizes[cut] - left) // context) > -(-sizes[cut] // context)
    assert not needless or (not whole and sizes[cut] * QUARTER >= context)
    return price + prices.cut * needless


@pytest.mark.parametrize("whole", [False, True])
def test_the_end_of_a_window_is_the_cheapest_of_all(whole: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(150):
        context = int(rng.integers(4, 60))
        room, sizes = int(rng.integers(1, context + 1)), rng.integers(0, context * 3 // 2, rng.integers(1, 8)).tolist()
        fitting = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
        scratch = np.empty(context + 1), np.empty(context + 1, dtype=np.int64)
        prices = WHOLE if whole else SOFT[int(rng.integers(len(SOFT)))]
        found = _fill(np.array(sizes), fitting, room, context, whole, *prices.row()[2:], *scratch)
        expected = cheapest(sizes, fitting, room, context, whole, prices)
        assert price_of(found, sizes, fitting, room, context, whole, prices) == pytest.approx(expected)


def packed(folder: Path, runs: list[int]) -> Loader:
    rng = np.random.default_rng(1)
    documents = [(i, rng.integers(2, 99, rng.integers(1, 9))) for i in range(len(runs))]
    counts = write_shard(folder, 0, documents, 16, 99, 1, packing="soft", runs=np.array(runs))
    figures = {"vocab_size": 99, "eos_id": 0, "pad_id": 1, "shard_windows": [counts["windows"]]}
    files = record_files(folder, shard_names(0))
    config = {"context": 16, "tokenizer": "0" * 64}
    write_manifest(folder, Manifest("pack", "f" * 64, "", config, figures, files, "2026-01-01T00:00:00+00:00"))
    return Loader(open_shards(folder), 4, 0, "segment", 0.02)


@pytest.mark.parametrize("positions", ["mask", "document", "window"])
def test_segments_are_runs_of_related_documents(tmp_path: Path, positions: str) -> None:
    runs = [0, 0, 0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 5, 6, 6, 6] * 3
    loader = packed(tmp_path, np.cumsum(np.append(True, np.diff(runs) != 0)).tolist())
    loader.positions = positions
    names = np.cumsum(np.append(True, np.diff(runs) != 0))
    batch = loader.batch(0, 0, 1)
    for row, window in enumerate(batch.windows):
        tokens, documents = loader.shards.window(int(window))
        segment, count, ids = -2, 0, []
        for place, document in enumerate(documents.tolist()):
            before = documents[place - 1] if place else None
            fresh = place == 0 or document != before
            if document < 0:
                segment = -1
            elif fresh and (segment < 0 or names[document] != names[before]):
                segment = document
            ids.append(segment)
            restart = place == 0 or (positions == "document" and fresh)
            restart |= positions == "mask" and place > 0 and ids[-1] != ids[-2]
            count = 0 if restart else count + 1
            assert batch.positions[row, place] == count
        assert batch.document_ids[row].tolist() == ids
        for place in range(15):
            goes_on = ids[place] == ids[place + 1] >= 0
            assert batch.labels[row, place] == (tokens[place + 1] if goes_on else IGNORE)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_is_unsorted_and_nothing_is_lost(share: float) -> None:
    places = partly_unsorted(1000, share)
    assert sorted(places.tolist()) == list(range(1000))
    assert np.mean(np.diff(places) != 1) == pytest.approx(share, abs=0.08)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-9, 30), max_size=8), max_size=30), st.sampled_from(MODES))
def test_spans_are_never_cut(documents: list[list[int]], packing: str) -> None:
    """Negative numbers are spans that stay whole, positive ones text between them."""
    context, place, lengths, spans = 10, 0, [], []
    for document in documents:
        first = place
        for run in document:
            spans += [(place, place - run)] if run < 0 else []
            place += abs(run)
        lengths.append(place - first)
    starts, ends = (np.array([span[i] for span in spans], dtype=np.int64) for i in (0, 1))
    pieces = plan(np.array(lengths, dtype=np.int64), context, packing, (starts, ends))
    firsts = np.cumsum([0, *lengths])
    kept = sorted((int(firsts[d] + offset), int(firsts[d] + offset + count)) for d, offset, count, _ in pieces.tolist())
    assert [a for a, _ in kept[1:]] == [b for _, b in kept[:-1]], "every token once"
    assert (kept[0][0], kept[-1][1]) == (0, place) if kept else place == 0
    borders = {a for a, _ in kept}
    assert not any(start < border < end for start, end in spans for border in borders)
    fill = np.bincount(pieces[:, 3], weights=pieces[:, 2])
    assert np.all((fill > 0) & (fill <= context))
    if packing == "concat" and spans and len(fill) > 1:
        assert fill[:-1].min() > context - max(end - start for start, end in spans)
