"""Block-lists of addresses: domains (with their subdomains), whole addresses, words in an address."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents, lines_of
from data.steps.kind import Verdicts, column

REASONS = ("url_domain", "url_address", "url_word", "url_soft_words")
EDITS = ""
WORD = re.compile(r"[^\W_]+")
WORDS = (
    "adult anal bdsm blowjob boobs camgirl cumshot erotic erotica escort fetish gangbang hardcore hentai milf naked "
    "nude nudes orgy porn porno pornhub pornstar pussy redtube sex sexcam sexy shemale slut threesome tits webcamsex "
    "whore xnxx xvideos xxx youporn"
)
ADULT = frozenset(WORDS.split())  # whole words of an address; a list of your own replaces them


@dataclass(frozen=True)
class Url(Annotator):
    """Whether a list holds an address' domain, the address, or one of its words; how many soft words it has."""

    domains: str
    urls: str
    words: str
    soft_words: str
    NAME: ClassVar[str] = "url"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [(name, pa.bool_()) for name in REASONS[:3]] + [("url_soft_words", pa.int64())]  # pyright: ignore[reportArgumentType]
    )
    FILES: ClassVar[tuple[str, ...]] = ("domains", "urls", "words", "soft_words")

    @cached_property
    def lists(self) -> tuple[frozenset[str], ...]:
        def entries(path: str) -> Iterable[str]:
            return lines_of(path) if path else ()

        domains = frozenset(entry.lower().strip(".") for entry in entries(self.domains))
        words = frozenset(map(str.lower, entries(self.words))) if self.words else ADULT
        addresses = frozenset(bare(entry) for entry in entries(self.urls))
        return domains, addresses, words, frozenset(map(str.lower, entries(self.soft_words)))

    def columns(self, documents: Documents) -> dict[str, Any]:
        rows = [self.look(url) for url in documents.column("url")]
        return {name: [row[place] for row in rows] for place, name in enumerate(REASONS)}

    def look(self, url: str | None) -> tuple[bool, bool, bool, int]:
        """The four columns of one address; without an address nothing is found."""
        if not url:
            return False, False, False, 0
        domains, addresses, words, soft = self.lists
        address = bare(url)
        host = address.partition("/")[0].partition(":")[0]
        labels = host.split(".")
        blocked = any(".".join(labels[place:]) in domains for place in range(len(labels)))
        found = set(WORD.findall(address.lower()))
        return blocked, address in addresses, not words.isdisjoint(found), len(soft & found)


def bare(url: str) -> str:
    """An address without scheme, user, ``www.`` and a slash at its end; the host in lower case."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
    except ValueError:  # such as an unfinished IPv6 host
        return url
    host = parts.netloc.rpartition("@")[2].lower().removeprefix("www.")
    return host + parts.path.rstrip("/") + (f"?{parts.query}" if parts.query else "")


def annotator(config: CurationConfig) -> Annotator | None:
    url = config.url
    return Url(url.domains, url.urls, url.words, url.soft_words) if url.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    for name in REASONS[:3]:
        yield name, column(columns, name) > 0
    least = config.url.min_soft_words
    soft = column(columns, "url_soft_words")
    yield "url_soft_words", soft >= least if least else np.zeros(len(soft), dtype=bool)
