"""A corpus with a known truth: documents that teach the built-in evaluation's skills, real prose, and distractors.

Everything is made from a seed and the documentation of the running Python, so that the whole of PreSelect runs and can
be judged without downloads: a source says what a document is, and nothing but reports reads it.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from data import python_docs
from data.documents import Document
from data.files import atomic_path
from data.preselect.exercises import WORDS, teaching_document

PROSE_CHARS = (300, 1500)
PIECES = 10  # of one document, at most
SITE = (
    "Accept all cookies to continue.",
    "Share this page with your friends.",
    "Subscribe to our newsletter today.",
    "Log in or create an account.",
    "All rights reserved.",
    "Read more about this offer.",
)


@cache
def _prose() -> tuple[str, ...]:
    """Pieces of the Python documentation of a paragraph or a few."""
    least, most = PROSE_CHARS
    texts = set[str]()
    for piece in python_docs.slices(1000):
        for document in python_docs.read(piece):
            if isinstance(document, Document):
                whole = document.text[: PIECES * most]
                texts |= {whole[at : at + most] for at in range(0, len(whole), most)}
    return tuple(sorted(text for text in texts if len(text) >= least))


def _shuffled(number: int, seed: int) -> str:
    """Prose with its words in random order."""
    words = prose(number, seed + 2).split()
    random.Random(f"shuffle {seed} {number}").shuffle(words)
    return " ".join(words)


def _repeated(number: int, seed: int) -> str:
    """A few words again and again."""
    draw = random.Random(f"repeat {seed} {number}")
    return " ".join(draw.sample(WORDS, 4)) * draw.randint(15, 40)


def _site(number: int, seed: int) -> str:
    """What surrounds articles on web pages."""
    draw = random.Random(f"site {seed} {number}")
    return "\n".join(f"{draw.choice(SITE)} ({draw.randint(1, 99)})" for _ in range(draw.randint(10, 25)))


def prose(number: int, seed: int) -> str:
    """A piece of real documentation; even and odd seeds draw from different pieces."""
    texts = _prose()[seed % 2 :: 2]
    return texts[random.Random(f"prose {seed} {number}").randrange(len(texts))]


MAKERS: dict[str, Callable[[int, int], str]] = {
    "teaching": teaching_document,
    "prose": prose,
    "shuffled": _shuffled,
    "repeated": _repeated,
    "site": _site,
}


def write_corpus(folder: Path, mixture: dict[str, float], count: int, seed: int) -> list[Path]:
    """Writes ``count`` documents, of each source its share of the mixture, as one JSONL file a source, each whole."""
    total, paths = sum(mixture.values()), []
    for source, share in mixture.items():
        paths.append(folder / f"{source}.jsonl")
        with atomic_path(paths[-1]) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for number in range(round(count * share / total)):
                row = {"id": f"{source}/{seed}/{number}", "text": MAKERS[source](number, seed)}
                file.write(json.dumps(row) + "\n")
    return paths
