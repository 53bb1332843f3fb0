"""Documents cut into windows that score every token once, and windows packed into rows without padding."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conf.errors import ConfigError


@dataclass(frozen=True)
class WindowRule:
    """How a model reads a document: the part of a loss cache's key that is neither the model nor the text.

    The first window begins with the model's start token, which is not scored, so that the document's first token is.
    A document longer than ``window`` goes on in windows that end ``stride`` tokens later each and score those alone,
    from ``window - stride`` to ``window - 1`` tokens of the document before them; they have no start token.
    """

    window: int  # tokens that the model reads at once
    stride: int  # tokens that a later window scores

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ConfigError("preselect.window", self.window, "a window predicts at least one token", "256")
        if not 1 <= self.stride <= self.window:
            rule = f"a later window scores 1 to preselect.window = {self.window} tokens"
            raise ConfigError("preselect.stride", self.stride, rule, f"preselect.stride={self.window // 2}")

    def key(self) -> str:
        """The rule as a part of a file name."""
        return f"w{self.window}s{self.stride}"


@dataclass(frozen=True)
class Window:
    """``tokens[:-1]`` are read, the last ``scored`` of ``tokens[1:]`` are predicted."""

    document: int
    tokens: Sequence[int]
    scored: int


def cut(document: int, tokens: Sequence[int], begin: Sequence[int], rule: WindowRule) -> Iterator[Window]:
    """The windows of one document, in its order; none where it has no token to score."""
    sequence = [*begin, *tokens]
    start = max(1, len(begin))  # the first token that is predicted; without a start token it is the second
    end = min(len(sequence), rule.window + 1)
    if start < end:
        yield Window(document, sequence[:end], end - start)
    while end < len(sequence):
        last, end = end, min(len(sequence), end + rule.stride)
        yield Window(document, sequence[max(0, end - rule.window - 1) : end], end - last)


def pack(windows: Sequence[Window], most: int) -> Iterator[list[int]]:
    """Numbers of windows that share a row of at most ``most`` tokens; one window may be longer.

    Longest first: equal lengths stand together, and the row that needs most memory is the first one.
    """
    order = sorted(range(len(windows)), key=lambda index: (-len(windows[index].tokens), index))
    row: list[int] = []
    size = 0
    for index in order:
        length = len(windows[index].tokens) - 1
        if row and size + length > most:
            yield row
            row, size = [], 0
        row.append(index)
        size += length
    if row:
        yield row


def text_key(text: str) -> bytes:
    """16 bytes of a text's digest, exact (no normalisation): the text part of a loss cache's key."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
