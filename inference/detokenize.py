"""Tokens to text piece by piece: no half characters, no half stop strings."""

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"  # what a decoder writes for bytes that form no character
HELD = 3  # an unfinished character has at most three bytes, and a decoder writes at most one mark for each
CONTEXT = 4  # earlier tokens decoded along, since a decoder may treat the first token of a text in its own way


class Detokenizer:
    """The text that each token adds.

    A token may hold a part of a character; its text is held back until the character is complete or the output
    ends. The pieces join to what decoding all tokens at once gives.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # the tokens that later text may depend on
        self._emitted = 0  # characters of the window's text already given out

    def push(self, token: int) -> str:
        """The text that is certain with this token; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = not text.endswith(UNKNOWN)
        stable = len(text) if complete else len(text) - _trailing(text)
        piece = text[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if complete and len(self._window) > CONTEXT:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """What is still held back, at the end of the output."""
        piece = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece

    def _shorten(self, text: str) -> None:
        kept = self._window[-CONTEXT:]
        shorter = self._decode(kept)
        # A cut inside a character, or before a token whose text depends on the ones before, would change the text.
        if text.endswith(shorter) and not shorter.startswith(UNKNOWN):
            self._window, self._emitted = kept, len(shorter)


def _trailing(text: str) -> int:
    """How many of the last ``HELD`` characters are marks that may still become a character."""
    return min(HELD, len(text) - len(text.rstrip(UNKNOWN)))


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that is certain not to be part of a stop string, whether one was found; the text then ends)."""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            # The one that is complete first, so that the result does not depend on how the text was cut.
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What is still held back, at the end of the output."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
