"""Each rule at its threshold, and features against direct counts."""

import unicodedata
from dataclasses import fields, is_dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import CurationConfig
from data.annotators import Documents
from data.dedup import repeats, text_hash
from data.steps.rules import REASONS, Features, Rules, measure, reasons

PROSE = "The quick brown fox jumps over the lazy dog near the river bank.\n"


def judge(text: str, config: CurationConfig) -> str | None:
    """The first rule that a text breaks."""
    columns = pa.table(Rules().columns(Documents.of([text])), schema=Rules.SCHEMA)
    return next((name for name, mask in reasons(columns, config) if mask[0]), None)


def reason(text: str, **thresholds: float) -> str | None:
    config = CurationConfig()
    off = {f.name: 0 for f in fields(config) if not is_dataclass(getattr(config, f.name))}
    return judge(text, CurationConfig(**{**off, **thresholds}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "thresholds", "expected"),
    [
        ("", {}, "empty"),
        (" \n\t ", {}, "empty"),
        ("a" * 199, {"min_chars": 200}, "too_short"),
        ("a" * 200, {"min_chars": 200}, None),
        ("a" * 11, {"max_chars": 10}, "too_long"),
        ("a" * 10, {"max_chars": 10}, None),
        ("ab\n" * 9 + "a" * 30, {"max_line_chars": 29}, "line_too_long"),
        ("ab\n" * 9 + "a" * 30, {"max_line_chars": 30}, None),
        ("1234567890 abc", {"min_letter_fraction": 0.25}, "few_letters"),
        ("123456789 abc", {"min_letter_fraction": 0.25}, None),
        ("same\nsame\nsame\nother", {"max_repeated_line_fraction": 0.45}, "repeated_lines"),
        ("same\nsame\nsame\nother", {"max_repeated_line_fraction": 0.5}, None),
        ("\ufffd" * 2 + "a" * 98, {"max_replacement_fraction": 0.01}, "wrong_encoding"),
        ("\x00\x1b" + "a" * 98, {"max_replacement_fraction": 0.01}, "wrong_encoding"),
        ("\ufffd" + "a" * 99, {"max_replacement_fraction": 0.01}, None),
        ("\ufffd\x00 1 1\n1\n1\n", {}, None),
    ],
)
def test_rules(text: str, thresholds: dict[str, float], expected: str | None) -> None:
    assert reason(text, **thresholds) == expected


@pytest.mark.parametrize(
    "text",
    [
        PROSE * 1 + "".join(f"Line {i} says something of its own about foxes.\n" for i in range(9)),
        "".join(f"第{i}章说明了系统的设计目标以及为什么需要这样的结构来处理很长的文本。\n" for i in range(12)),
        "".join(f"यह दस्तावेज़ {i} हिन्दी में लिखा गया है और इसमें कई वाक्य हैं।\n" for i in range(12)),
        "".join(f"هذا النص رقم {i} مكتوب باللغة العربية لاختبار القواعد.\n" for i in range(12)),
        "".join(f"def function_{i}(argument):\n    return argument + {i}\n\n" for i in range(12)),
    ],
)
def test_default_rules_keep_every_language_and_code(text: str) -> None:
    assert judge(text, CurationConfig()) is None


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=120))
def test_features_equal_direct_counts(text: str) -> None:
    found = measure(text)
    visible = [c for c in text if not c.isspace()]
    bad = [c for c in visible if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cs")]
    letters = [c for c in visible if unicodedata.category(c)[0] in "LM"]
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    repeated = sum(len(s.strip()) for i, s in enumerate(lines) if s.strip() in {x.strip() for x in lines[:i]})
    assert found.chars == len(text)
    assert found.visible == len(visible)
    assert found.longest_line == max(map(len, lines))
    assert found.letters == pytest.approx(len(letters) / max(1, len(visible)))
    assert found.replacements == pytest.approx(len(bad) / max(1, len(text)))
    assert found.repeated_lines == pytest.approx(repeated / max(1, sum(len(s.strip()) for s in lines)))


def test_verdicts_are_named_and_ordered_like_the_reasons() -> None:
    worst = Features(chars=10, visible=0, longest_line=10, letters=0.0, repeated_lines=1.0, replacements=1.0)
    config = CurationConfig(min_chars=11, max_chars=9, max_line_chars=9)
    columns = pa.Table.from_pylist([vars(worst)], schema=Rules.SCHEMA)
    verdicts = list(reasons(columns, config))
    assert tuple(name for name, _ in verdicts) == REASONS
    assert all(mask.tolist() == [True] for _, mask in verdicts)


@pytest.mark.parametrize(
    ("one", "two", "equal"),
    [
        ("Hello  World\n", "hello world", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("stra\u00dfe", "STRASSE", True),
        ("hello world", "hello, world", False),
        ("ab c", "a bc", False),
    ],
)
def test_text_hash_ignores_form_case_and_space(one: str, two: str, equal: bool) -> None:
    assert (text_hash(one) == text_hash(two)) is equal


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=40))
def test_repeats_against_a_dictionary(rows: list[tuple[int, int, bool]]) -> None:
    seen: set[tuple[int, int]] = set()
    expected = []
    for high, low, candidate in rows:
        expected.append(candidate and (high, low) in seen)
        if candidate:
            seen.add((high, low))
    hashes = np.array([row[:2] for row in rows], dtype=np.uint64).reshape(-1, 2)
    assert repeats(hashes, np.array([row[2] for row in rows], dtype=bool)).tolist() == expected
