"""How many rows of prompts a pass may have that also continues texts: what it may cost those texts decides.

A row's time depends on the machine, the model and how long the prompt's past is, so it is measured as passes go by.
"""

LEAST = 8  # rows: a prompt goes on, however slow it is
FIRST = 16  # rows before any have been measured
MEMORY = 0.8  # weight of what was measured before against the newest pass
FRESH = 64  # passes with prompts after which one without says again how long that takes


class Pace:
    """Bounds the rows so that a pass takes at most ``slowdown`` times what it would take without prompts."""

    def __init__(self, most: int, slowdown: float) -> None:
        self.most, self.slowdown = most, slowdown
        self._plain: dict[int, float] = {}  # seconds of a pass without prompts, by how many texts it continues
        self._row: float | None = None  # seconds that a row of a prompt adds
        self._since = 0  # passes with prompts since one without

    def rows(self, texts: int) -> int:
        """Rows of prompts beside ``texts`` that are continued; 0 where the pass is needed to measure these alone."""
        if not self.slowdown:
            return self.most
        if texts not in self._plain or self._since >= FRESH:
            return 0
        if self._row is None:
            return min(FIRST, self.most)
        allowed = (self.slowdown - 1.0) * self._plain[texts] / max(self._row, 1e-9)
        return min(max(int(allowed), LEAST), self.most)

    def saw(self, texts: int, rows: int, seconds: float) -> None:
        """A pass that continued ``texts`` took this long with ``rows`` of prompts."""
        if not texts:
            return
        if not rows:
            self._plain[texts] = _blended(self._plain.get(texts), seconds)
            self._since = 0
        elif texts in self._plain:
            self._row = _blended(self._row, max(0.0, seconds - self._plain[texts]) / rows)
            self._since += 1


def _blended(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1 - MEMORY) * now
