"""Equations in a text, such as ``14 + 2 * 3 = 20``, and whether they hold."""

import re

TERM = r"[$\u20ac\u00a3]?\d[\d,]*(?:\.\d+)?%?(?:\s?[^\W\d_]{1,12})?"  # a number, perhaps with its unit
EQUATION = re.compile(rf"({TERM}(?:\s*[-+*/x\u00d7\u00f7\u2212]\s*{TERM})+)\s*=\s*({TERM})")
PARTS = re.compile(r"\d[\d,]*(?:\.\d+)?|(?<=[\s\d%\w])[-+*/x\u00d7\u00f7\u2212](?=\s*[$\u20ac\u00a3]?\d)")
TOLERANCE = 0.006  # of a result that is rounded to cents


def number(text: str) -> float:
    """The value of digits with thousands separators."""
    return float(text.replace(",", ""))


def equations(text: str) -> list[tuple[float, bool]]:
    """The result of each equation, as it is written, and whether it holds."""
    found = []
    for match in EQUATION.finditer(text):
        result = number(re.findall(r"\d[\d,]*(?:\.\d+)?", match[2])[0])
        value = _value(PARTS.findall(match[1]))
        found.append((result, value is not None and abs(value - result) <= max(TOLERANCE, 1e-3 * abs(result))))
    return found


def _value(parts: list[str]) -> float | None:
    """Multiplication and division first, then from left to right; None for what is no expression."""
    if len(parts) % 2 == 0 or any(part[0].isdigit() != (i % 2 == 0) for i, part in enumerate(parts)):
        return None
    terms, signs = [number(parts[0])], [1.0]
    for sign, operand in zip(parts[1::2], map(number, parts[2::2]), strict=True):
        if sign in "*x\u00d7":
            terms[-1] *= operand
        elif sign in "/\u00f7":
            if not operand:
                return None
            terms[-1] /= operand
        else:
            terms.append(operand)
            signs.append(1.0 if sign == "+" else -1.0)
    return sum(sign * term for sign, term in zip(signs, terms, strict=True))
