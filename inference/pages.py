"""The key-value cache as pages with reference counts, some of them remembered by the text that they hold.

A page holds the keys and values of ``page_tokens`` consecutive tokens of one text in every layer. A full page is
remembered under a chained digest of all tokens up to its end and of the tenant's salt, so a later request that begins
with the same tokens under the same salt shares it. A page that nobody uses but that is remembered stays until its room
is needed; the one not used for the longest time goes first.

Attention reads a run of adjacent pages in place, so pages of one request are taken side by side where possible.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PagePool:
    """Bookkeeping of ``pages`` pages; the tensors live elsewhere."""

    def __init__(self, pages: int, page_tokens: int, remember: bool = True) -> None:
        self.pages, self.page_tokens, self.remember = pages, page_tokens, remember
        self._users = [0] * pages
        self._blank = np.ones(pages, dtype=bool)
        self._blanks = pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._content_of: dict[int, bytes] = {}
        self._by_content: dict[bytes, tuple[int, int]] = {}  # (page, position of its first token)
        self._unused: OrderedDict[int, None] = OrderedDict()  # remembered, in the order of last use

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return self._blanks + len(self._unused)

    @property
    def used(self) -> int:
        """Pages that requests hold."""
        return self.pages - self.available

    @property
    def remembered(self) -> int:
        """Unused pages that keep a text."""
        return len(self._unused)

    def take(self, after: int | None) -> int | None:
        """A page for one user, right behind page ``after`` where that is blank; None when all are in use."""
        page = -1 if after is None else after + 1
        if not (0 <= page < self.pages and self._blank[page]):
            if self._blanks:
                page = self._start_of_run()
            elif self._unused:
                page = self._forget_oldest()
            else:
                return None
        self._blank[page] = False
        self._blanks -= 1
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user of a page that holds a text."""
        self._users[page] += 1
        self._unused.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each; the end of a text is forgotten before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was released twice"
            if self._users[page]:
                continue
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._blank[page] = True
                self._blanks += 1

    def match(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """The remembered pages that hold the beginning of ``tokens``; the caller shares what it uses."""
        found: list[int] = []
        key = salt
        for start in range(0, len(tokens) - self.page_tokens + 1, self.page_tokens):
            key = chained(key, tokens[start : start + self.page_tokens])
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def find(self, content: bytes) -> tuple[int, int] | None:
        """(page, position of its first token) of remembered tokens, whatever stands before them; None: there is none.
        ``content`` is ``chained(salt, tokens)`` of one page."""
        return self._by_content.get(content)

    def keep(self, page: int, key: bytes, content: bytes, start: int) -> None:
        """Remember a full page under its key; the first page of the same text stays the one that is found."""
        if self.remember and key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
            self._content_of[page] = content
            self._by_content[content] = (page, start)

    def _forget_oldest(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        content = self._content_of.pop(page)
        if self._by_content.get(content, (None, 0))[0] == page:
            del self._by_content[content]
        self._blank[page] = True
        self._blanks += 1
        return page

    def _start_of_run(self) -> int:
        """Half-way into the longest blank run, so that the run before it and the new one both have room to grow."""
        edges = np.flatnonzero(np.diff(self._blank, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        longest = int((ends - starts).argmax())
        start, end = int(starts[longest]), int(ends[longest])
        return start if start == 0 else (start + end) // 2


def chained(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page from the key of the page before it (the salt, for the first)."""
    return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()
