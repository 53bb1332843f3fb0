"""The published rules against slow direct readings of them, and cases at their thresholds."""

# ruff: noqa: RUF001 - punctuation as texts have it
import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps import STEPS
from data.steps.c4 import C4, CleanLines, clean_lines, edits_of
from data.steps.kind import apply_edits
from data.steps.repetition import Repetition
from data.steps.words import count_sentences, count_words, split_chunk, split_words

PROSE = "The river runs to the sea, and with it the boats of the town that have sails. "


def table(annotator: Annotator, texts: list[str]) -> pa.Table:
    columns = annotator.columns(Documents.of(texts))
    return pa.Table.from_pydict({f.name: pa.array(columns[f.name], f.type) for f in annotator.SCHEMA})


def reason(step: str, text: str, **settings: Any) -> str | None:
    config = CurationConfig()
    group = getattr(config, step)
    for name, value in {"enabled": True, **settings}.items():
        setattr(group, name, value)
    annotator = STEPS[step].annotator(config)
    assert annotator is not None
    verdicts = STEPS[step].reasons(table(annotator, [text]), config)
    return next((name for name, mask in verdicts if mask[0]), None)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ("word", ["word"]),
        ("(don't,", ["(", "do", "n't", ","]),
        ("she'll", ["she", "'ll"]),
        ("Mr.", ["Mr."]),
        ("end.", ["end", "."]),
        ("U.S.", ["U.S."]),
        ("wait...", ["wait", "..."]),
        ("3.5km", ["3.5", "km"]),
        ("well-known", ["well", "-", "known"]),
        ("x=y", ["x", "=", "y"]),
        ("a,b", ["a", ",", "b"]),
        ("end.Start", ["end", ".", "Start"]),
        ("https://example.org/a-b?c=d", ["https://example.org/a-b?c=d"]),
        ("“Quoted”", ["“", "Quoted", "”"]),
        ("dog's", ["dog", "'s"]),
        ("$5", ["$", "5"]),
        ("--", ["--"]),
    ],
)
def test_words_of_a_chunk(chunk: str, words: list[str]) -> None:
    assert split_chunk(chunk) == words


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aB1.,'\"()-–… \n$:/=!?’é中", max_size=60))
def test_words_keep_every_visible_character(text: str) -> None:
    pieces = [word for chunk in text.split() for word in split_chunk(chunk)]
    assert "".join(pieces) == "".join(text.split())
    assert count_words(text) == len(pieces)
    assert len(split_words([text, "", text]).numbers) == 2 * len(pieces)


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("One. Two! Three?", 3),
        ("Mr. Smith came.", 1),
        ("Really?! Yes.", 2),
        ("no end", 1),
        ('He said "No." Then left.', 2),
    ],
)
def test_sentences(line: str, sentences: int) -> None:
    assert count_sentences(line.split()) == sentences


def slow_repetition(text: str) -> dict[str, float]:
    """Table A1 read word by word."""
    words = [word for chunk in text.split() for word in split_chunk(chunk)]
    found = {}
    for n in (2, 3, 4):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        gram, count = Counter(grams).most_common(1)[0] if grams else ("", 0)
        found[f"top_{n}_gram"] = len(gram) * count / max(1, len(text))
    for n in range(5, 11):
        seen: set[tuple[str, ...]] = set()
        chars = i = 0
        while i <= len(words) - n:
            if tuple(words[i : i + n]) in seen:
                chars += sum(map(len, words[i : i + n]))
                i += n
            else:
                seen.add(tuple(words[i : i + n]))
                i += 1
        found[f"duplicate_{n}_grams"] = chars / max(1, len(text))
    return found


def test_repeated_n_grams_against_a_loop() -> None:
    chance = random.Random(3)
    texts = ["", "one", "a b a b a b a b a b a b", "x " * 40]
    for _ in range(60):
        vocabulary = ["w" * chance.randint(1, 6) + str(i) for i in range(chance.choice([2, 4, 30]))]
        phrase = " ".join(chance.choices(vocabulary, k=12))
        pieces = [phrase if chance.random() < 0.3 else " ".join(chance.choices(vocabulary, k=7)) for _ in range(8)]
        texts.append("\n".join(pieces))
    rows = table(Repetition(), texts).to_pylist()
    for text, row in zip(texts, rows, strict=True):
        for name, value in slow_repetition(text).items():
            assert row[name] == pytest.approx(value, abs=1e-12), (name, text)


def test_columns_do_not_depend_on_the_batch() -> None:
    texts = [PROSE * n + "Page {n}.\nAgain.\n" * n for n in range(1, 9)]
    for step in ("repetition", "gopher", "c4", "fineweb"):
        config = CurationConfig()
        getattr(config, step).enabled = True
        annotator = STEPS[step].annotator(config)
        assert annotator is not None
        whole = table(annotator, texts).to_pylist()
        assert whole == [row for text in texts for row in table(annotator, [text]).to_pylist()]


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("gopher", PROSE * 4, None),
        ("gopher", PROSE * 2, "gopher_few_words"),
        ("gopher", "a b c d e " * 20, "gopher_short_words"),
        ("gopher", "unquestionably extraordinary " * 60, "gopher_long_words"),
        ("gopher", PROSE * 4 + "# " * 20, "gopher_hashes"),
        ("gopher", PROSE * 4 + "wait... " * 20, "gopher_ellipses"),
        ("gopher", "- the boats of the town\n" * 30, "gopher_bullet_lines"),
        ("gopher", PROSE * 4 + "12 34 56 " * 10, "gopher_few_alpha_words"),
        ("gopher", "boats sail rivers quickly " * 30, "gopher_few_stop_words"),
        ("repetition", "One line here.\n" * 4 + "Another.", "duplicate_lines"),
        ("repetition", "One paragraph.\n\n" * 4 + "Another.", "duplicate_paragraphs"),
        ("repetition", "so it goes " * 30, "top_2_gram"),
        ("c4", (PROSE + "\n") * 5, None),
        ("c4", (PROSE + "\n") * 4, "c4_few_sentences"),
        ("c4", (PROSE + "\n") * 9 + "Lorem ipsum dolor sit.", "c4_lorem_ipsum"),
        ("c4", (PROSE + "\n") * 9 + "A function { is code.", "c4_curly_bracket"),
        ("fineweb", "".join(f"Line {i} is long enough to count as one.\n" for i in range(9)), None),
        ("fineweb", "".join(f"Line {i} has no punctuation at its end\n" for i in range(9)), "fineweb_punctuation"),
        ("fineweb", "".join(f"Short {i}.\n" for i in range(9)), "fineweb_short_lines"),
        ("fineweb", "The same line is here twice, word by word.\n" * 2, "fineweb_duplicate_lines"),
        ("fineweb", "\n\n", "fineweb_empty"),
    ],
)
def test_rules(step: str, text: str, expected: str | None) -> None:
    assert reason(step, text) == expected
    off = {name: 0 for name in vars(getattr(CurationConfig(), step)) if name.startswith(("min_", "max_"))}
    lists = {
        name: [0.0] * len(value) for name, value in vars(CurationConfig().repetition).items() if type(value) is list
    }
    if expected is not None and not expected.endswith(("lorem_ipsum", "curly_bracket", "empty")):
        assert reason(step, text, **{**off, **(lists if step == "repetition" else {})}) is None


def test_c4_removes_lines_and_the_edits_say_how() -> None:
    text = (
        "  The first line stays here [1].\r\nno end mark here\nTwo words.\nEnable javascript to go on.\n\n"
        "We like the privacy policy.\nThe second [citation needed] line stays, too!\n\tAnd the third one.  \n"
    )
    config = CurationConfig()
    cleaned = CleanLines(**clean_lines(config)).clean(text)
    assert cleaned.text == "The first line stays here .\nThe second  line stays, too!\nAnd the third one."
    assert cleaned.sentences == 3
    assert apply_edits(text, edits_of(text, cleaned)) == cleaned.text
    config.c4.terminal_punctuation = False
    assert "no end mark here" in CleanLines(**clean_lines(config)).clean(text).text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab. \n\r\t[1]!", max_size=80))
def test_edits_give_the_cleaned_text(text: str) -> None:
    rules = CleanLines(False, 1, 1000, True, True, True)
    cleaned = rules.clean(text)
    assert apply_edits(text, edits_of(text, cleaned)) == cleaned.text
    stored = table(C4(False, 1, 1000, True, True, True), [text]).column("c4_edits").to_pylist()[0]
    assert apply_edits(text, stored) == cleaned.text
