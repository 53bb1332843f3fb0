"""Packed token shards: memory-mapped windows of a fixed length, with the documents that each window holds.

Files of a packed folder, for shard number 00000 and on:

- ``tokens-00000.bin``: uint16 or uint32, window-major, ``context`` tokens a window;
- ``spans-00000.npy``: int64 ``[spans, 5]``, rows ``(window in the shard, start in the window, document, offset in the
  document, segment)``; ``document`` is its position in the order, or -1 for padding; ``segment`` is the first document
  of the run of related documents in the window;
- ``pointers-00000.npy``: int64 ``[windows + 1]``, the spans of window ``w`` are ``pointers[w]:pointers[w + 1]``;
- ``manifest.json``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.files import atomic_path
from data.images import image_spans
from data.manifest import Manifest, broken_files, read_manifest
from data.packing import cut_documents, plan

Ints = npt.NDArray[np.int64]
PADDING = -1  # document id of padding tokens


def token_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_names(shard: int) -> tuple[str, str, str]:
    """File names of one shard: tokens, spans, pointers."""
    return f"tokens-{shard:05d}.bin", f"spans-{shard:05d}.npy", f"pointers-{shard:05d}.npy"


def write_shard(
    folder: str | Path,
    number: int,
    documents: Iterable[tuple[int, npt.NDArray[Any]]],
    context: int,
    vocab_size: int,
    pad_id: int,
    packing: str = "concat",
    runs: npt.NDArray[Any] | None = None,
    images: tuple[int, ...] = (),
) -> dict[str, int]:
    """Writes one shard: the documents' tokens in windows of ``context``, placed as ``data.packing`` says.

    ``documents`` yields (document number, tokens, which may be mapped); ``runs`` names each one's run of related
    documents (none: each is alone); ``images`` are the ids of begin and end of an image, which is never cut. Returns
    the numbers of ``windows``, of ``tokens`` (without padding) and of documents ``cut`` into more pieces than their
    length asks for. A shard without tokens has no windows.
    """
    names, dtype, rows = [Path(folder) / name for name in shard_names(number)], token_dtype(vocab_size), list(documents)
    lengths = np.array([len(tokens) for _, tokens in rows], dtype=np.int64)
    whole = image_spans(np.concatenate([tokens for _, tokens in rows]), *images) if images and rows else None
    pieces = plan(lengths, context, packing, whole)
    windows = int(pieces[-1, 3]) + 1 if len(pieces) else 0
    spans: list[tuple[int, int, int, int, int]] = []
    with atomic_path(names[0]) as temporary, open(temporary, "wb") as file:
        place, before = 0, 0  # in the shard; the document before
        for row, offset, count, window in [*pieces.tolist(), (-1, 0, 0, windows)]:
            if padding := (window * context - place if place < window * context else 0):
                spans.append((place // context, place % context, PADDING, 0, PADDING))
                file.write(np.full(padding, pad_id, dtype=dtype).tobytes())
                place += padding
            if row >= 0:
                document, tokens = rows[row]
                related = runs is not None and place % context and runs[row] == runs[before]
                spans.append((window, place % context, document, offset, spans[-1][4] if related else document))
                file.write(np.asarray(tokens[offset : offset + count], dtype=dtype).tobytes())
                place, before = place + count, row
    table = np.array(spans, dtype=np.int64).reshape(-1, 5)
    for name, array in zip(names[1:], (table, np.searchsorted(table[:, 0], np.arange(windows + 1))), strict=True):
        write_array(name, array.astype(np.int64))
    cut = cut_documents(pieces, lengths, context)
    return {"windows": windows, "tokens": int(lengths.sum()), "cut": cut}


def write_array(path: str | Path, array: npt.NDArray[Any]) -> None:
    """Saves an array as .npy, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


@dataclass(frozen=True)
class Shard:
    """One shard's memory maps."""

    tokens: npt.NDArray[Any]  # [windows, context]
    spans: Ints  # [spans, 5]
    pointers: Ints  # [windows + 1]


class Shards:
    """All windows of a packed folder, by number. Windows are read on demand through memory maps."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        figures = manifest.figures
        self.folder, self.manifest = folder, manifest
        self.fingerprint = manifest.fingerprint
        self.context = int(manifest.config["context"])
        self.vocab_size = int(figures["vocab_size"])
        self.eos_id, self.pad_id = int(figures["eos_id"]), int(figures["pad_id"])
        self.tokenizer_digest = str(manifest.config["tokenizer"])
        self.counts: list[int] = [int(n) for n in figures["shard_windows"]]  # windows of each shard
        self._maps: dict[int, Shard] = {}
        self.starts: Ints = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard(self, number: int) -> Shard:
        """The memory maps of one shard, made at its first use."""
        if number in self._maps:
            return self._maps[number]
        tokens, spans, pointers = (self.folder / name for name in shard_names(number))
        dtype, shape = token_dtype(self.vocab_size), (self.counts[number], self.context)
        self._maps[number] = Shard(
            np.memmap(tokens, dtype=dtype, mode="r", shape=shape),
            np.load(spans, mmap_mode="r"),
            np.load(pointers, mmap_mode="r"),
        )
        return self._maps[number]

    def window(self, index: int) -> tuple[Ints, Ints]:
        """Tokens int64 ``[context]`` and document ids int64 ``[context]`` (-1 on padding) of one window."""
        tokens, documents = self.windows(np.array([index]))
        return tokens[0], documents[0]

    def windows(self, indices: npt.ArrayLike, unit: str = "document") -> tuple[Ints, Ints]:
        """Tokens and document (or ``segment``) ids, each int64 ``[len(indices), context]``, as ``indices`` say."""
        tokens, starts, ids = self.spans_of(indices, unit)
        lengths = np.diff(np.append(starts, tokens.size))
        return tokens.astype(np.int64), np.repeat(ids, lengths).reshape(tokens.shape)

    def spans_of(self, indices: npt.ArrayLike, unit: str) -> tuple[npt.NDArray[Any], Ints, Ints]:
        """Tokens in their stored type ``[windows, context]``; where spans start in the flat block, and their ids."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"window numbers lie in 0..{len(self) - 1}")
        tokens = np.empty((wanted.size, self.context), dtype=token_dtype(self.vocab_size))
        numbers, starts, ids = np.searchsorted(self.starts, wanted, side="right") - 1, [], []
        for number in np.unique(numbers):
            rows = np.flatnonzero(numbers == number)
            shard, local = self.shard(int(number)), wanted[rows] - self.starts[number]
            tokens[rows] = shard.tokens[local]
            first, counts = shard.pointers[local], shard.pointers[local + 1] - shard.pointers[local]
            ends = np.cumsum(counts)
            spans = shard.spans[np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts)]
            starts.append(spans[:, 1] + np.repeat(rows * self.context, counts))
            ids.append(spans[:, 2 if unit == "document" else 4])
        if not starts:
            return tokens, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        flat = np.concatenate(starts)
        order = np.argsort(flat, kind="stable") if len(starts) > 1 else slice(None)
        return tokens, flat[order], np.concatenate(ids)[order]

    def require_tokenizer(self, digest: str) -> None:
        """Raises DataError unless ``digest`` is that of the tokenizer which made the tokens."""
        if digest != self.tokenizer_digest:
            raise DataError(
                str(self.folder),
                f"tokens of tokenizer {self.tokenizer_digest[:16]}, given {digest[:16]}",
                "tokens are read with the tokenizer that made them",
                "pack again with data.overwrite=true, or use the tokenizer of these shards",
            )


def open_shards(folder: str | Path) -> Shards:
    """Opens a packed folder. Raises DataError when it is unfinished or a file is missing or truncated."""
    folder = Path(folder)
    manifest = read_manifest(folder, command="pack")
    if manifest.stage != "pack":
        raise DataError(str(folder), manifest.stage, "the folder holds packed shards", "name a packed-* folder")
    if broken := broken_files(folder, manifest.files):
        rule = "every file has the size that the manifest records"
        raise DataError(str(folder), f"{broken[0]} is missing or has another size", rule, "run `sundog pack` again")
    shards = Shards(folder, manifest)
    width = np.dtype(token_dtype(shards.vocab_size)).itemsize * shards.context
    for number, windows in enumerate(shards.counts):
        names = shard_names(number)
        if any(name not in manifest.files for name in names) or manifest.files[names[0]]["bytes"] != windows * width:
            raise DataError(
                str(folder / names[0]), f"{windows} windows", "the manifest agrees with its files", "pack again"
            )
    return shards
