"""A fastText classifier of two labels as what it is: a linear function of word and n-gram counts.

With one hidden layer, no subwords and a softmax over two labels, the log-odds of a text are the mean over its words and
n-grams of ``(o_1 - o_0) . row``, so one number a row replaces a vector of 100, and scoring is a look-up. Splitting into
words, hashes and the order of rows are fastText's (Joulin et al. 2017; dictionary.cc), so the probabilities are the
library's to rounding (it reports them plus 1e-5).
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.files import read_json, write_atomic
from data.shards import write_array

END = b"</s>"  # fastText's end of a line
LABEL = "__label__"
FNV_START, FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
NGRAM_PRIME = np.uint64(116049371)
WORDS, ROWS, SETTINGS = "words.txt", "rows.npy", "settings.json"
Floats = npt.NDArray[np.float64]


def prepare(text: str) -> str:
    """One line without what fastText would read as an end of line or a label; the same for training and scoring."""
    if "</s>" in text:
        text = text.replace("</s>", " ")
    if LABEL in text:
        text = text.replace(LABEL, "label ")
    return text.replace("\n", " ").replace("\0", " ")


def word_hashes(words: Sequence[bytes]) -> npt.NDArray[np.uint32]:
    """FNV-1a of each word, [words]; bytes above 127 enter sign-extended, as fastText's chars do."""
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    starts = np.cumsum(lengths) - lengths
    joined = np.frombuffer(b"".join(words), np.int8).astype(np.int32).view(np.uint32)
    order = np.argsort(-lengths, kind="stable")  # words of at least a given length are a prefix of this order
    hashes = np.full(len(words), FNV_START, np.uint32)
    for place in range(int(lengths.max(initial=0))):
        longer = order[: np.searchsorted(-lengths[order], -place, "left")]
        hashes[longer] = (hashes[longer] ^ joined[starts[longer] + place]) * FNV_PRIME
    return hashes


@dataclass(frozen=True)
class LinearScorer:
    """``rows`` float64 [words + buckets]: what each word, then each n-gram bucket, adds to the log-odds."""

    words: list[bytes]
    rows: Floats
    word_ngrams: int

    @cached_property
    def _index(self) -> dict[bytes, int]:
        return {word: index for index, word in enumerate(self.words)}

    @cached_property
    def _hashes(self) -> npt.NDArray[np.uint32]:
        return np.append(word_hashes(self.words), np.uint32(0))  # the last one stands for words that are not known

    @cached_property
    def _word_rows(self) -> Floats:
        return np.append(self.rows[: len(self.words)], 0.0)

    def log_odds(self, texts: Sequence[str]) -> Floats:
        """Log-odds of label 1 for raw texts, [texts]."""
        if not texts:
            return np.zeros(0)
        split = [prepare(text).encode("utf-8", "replace").split() for text in texts]
        for words in split:
            words.append(END)
        flat = list(itertools.chain.from_iterable(split))
        lengths = np.fromiter(map(len, split), np.int64, len(split))
        starts = np.cumsum(lengths) - lengths
        index = np.fromiter(map(self._index.get, flat, itertools.repeat(-1)), np.int64, len(flat))
        counts = np.add.reduceat(index >= 0, starts, dtype=np.int64)
        sums = np.add.reduceat(self._word_rows[index], starts)
        for reach, buckets in enumerate(self._ngrams(flat, index), 1):
            added = np.zeros(len(flat))
            added[: len(buckets)] = self.rows[buckets]
            for behind in range(reach):  # those that run into the next text
                added[np.maximum(starts[1:] - 1 - behind, 0)] = 0.0
            sums += np.add.reduceat(added, starts)
            counts += np.maximum(lengths - reach, 0)
        return sums / np.maximum(counts, 1)

    def _ngrams(self, flat: list[bytes], index: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Rows of the n-grams of two words, of three and so on that begin at each word."""
        hashes = self._hashes[index]
        unknown = np.flatnonzero(index < 0)
        if unknown.size:
            hashes[unknown] = word_hashes([flat[place] for place in unknown])
        wide = hashes.view(np.int32).astype(np.int64).view(np.uint64)  # fastText keeps them as int32
        running, buckets = wide, np.uint64(len(self.rows) - len(self.words))
        for reach in range(1, self.word_ngrams):
            running = running[:-1] * NGRAM_PRIME + wide[reach:]
            remainder = running - running // buckets * buckets  # numpy divides by a constant faster than it takes %
            yield remainder.astype(np.int64) + len(self.words)


def save_linear(scorer: LinearScorer, folder: Path) -> list[str]:
    """Writes a folder that ``load_linear`` reads; returns the names of its files."""
    write_atomic(folder / WORDS, b"\n".join(scorer.words))
    write_array(folder / ROWS, scorer.rows)
    write_atomic(folder / SETTINGS, json.dumps({"word_ngrams": scorer.word_ngrams, "words": len(scorer.words)}) + "\n")
    return [WORDS, ROWS, SETTINGS]


def load_linear(folder: str | Path) -> LinearScorer:
    """The scorer of a folder. Raises DataError when it is not one."""
    folder = Path(folder).expanduser()
    rule, fix = "the folder of a scorer that `sundog scorer` made", "check curation.preselect.scorer"
    settings: Any = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
    if not isinstance(settings, dict) or not {"words", "word_ngrams"} <= set(settings):
        raise DataError(str(folder), f"no {SETTINGS}", rule, fix)
    try:
        words, rows = (folder / WORDS).read_bytes().split(b"\n"), np.load(folder / ROWS)
    except (OSError, ValueError) as error:
        raise DataError(str(folder), str(error)[:200], rule, fix) from error
    if len(words) != settings["words"] or rows.ndim != 1 or len(rows) < len(words):
        raise DataError(str(folder), f"{len(words)} words, rows {list(rows.shape)}", rule, fix)
    return LinearScorer(words, rows, int(settings["word_ngrams"]))
