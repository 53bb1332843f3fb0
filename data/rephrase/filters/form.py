"""What a style's form demands: complete pairs of question and answer, a table that parses, steps that count, equations
that hold, prose without lists."""

import re

from conf.rephrase import OutputFilterConfig
from data.rephrase.filters.arithmetic import equations
from data.rephrase.filters.kind import Output

REASONS = ("form", "wrong_arithmetic")
PAIR = re.compile(r"(?m)^[ \t]*\**(Question|Answer)\**[ \t]*\d*[ \t]*:\**[ \t]*")
STEP = re.compile(r"(?m)^[ \t]*(?:\**Step )?(\d{1,2})[.):]\**[ \t]+\S")
MARKUP = re.compile(
    r"(?m)^[ \t]*(?:[-*\u2022] |#{1,6} |\d{1,2}[.)] |\||```|(?:Question|Answer|Problem|Solution)\W{0,3}:)"
)
SEPARATOR = re.compile(r"\|?\s*:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)*\|?")


def judge(output: Output, limits: OutputFilterConfig) -> str:
    del limits
    text = output.text
    match output.style.form:
        case "dialogue":
            return "" if _dialogue(text) else "form"
        case "faq":
            return "" if _faq(text) else "form"
        case "table":
            return "" if _table(text) else "form"
        case "steps":
            return "" if _steps(text) else "form"
        case "problem":
            return _problem(text)
        case _:
            return "form" if len(MARKUP.findall(text)) > 1 or MARKUP.match(text) else ""


def _dialogue(text: str) -> bool:
    """Question and answer in turn, none of them empty."""
    pieces = PAIR.split(text)
    labels, bodies = pieces[1::2], pieces[2::2]
    turns = ["Question", "Answer"] * (len(labels) // 2)
    return not pieces[0].strip() and bool(labels) and labels == turns and all(body.strip() for body in bodies)


def _faq(text: str) -> bool:
    """Two questions or more on lines of their own, each with an answer under it."""
    lines = [line.strip().strip("*# ") for line in text.splitlines() if line.strip()]
    asked = [line.endswith("?") for line in lines]
    answered = all(not (one and other) for one, other in zip(asked, [*asked[1:], True], strict=True))
    return sum(asked) >= 2 and answered


def _table(text: str) -> bool:
    """A head, a separator and two rows or more, all of the same number of cells."""
    rows = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    if len(rows) < 4 or not SEPARATOR.fullmatch(rows[1]):
        return False
    cells = {len(row.strip("|").split("|")) for row in rows}
    empty = any(not row.replace("|", "").strip() for row in rows)
    return len(cells) == 1 and cells.pop() >= 2 and not empty


def _steps(text: str) -> bool:
    """Two numbered steps or more, counted from 1."""
    numbers = [int(number) for number in STEP.findall(text)]
    return len(numbers) >= 2 and numbers == list(range(1, len(numbers) + 1))


def _problem(text: str) -> str:
    first, second = text.find("Problem:"), text.find("Solution:")
    if first != 0 or second <= first or not text[len("Problem:") : second].strip():
        return "form"
    found = equations(text[second:])
    if not found:
        return "form"
    return "" if all(holds for _, holds in found) else "wrong_arithmetic"
