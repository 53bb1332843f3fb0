"""The filters: each catches its failure, good rephrases pass, and the labelled bench keeps its bounds."""

import math
from collections import defaultdict

import pytest

from benchmarks.rephrase_labels import CLEAN, OWN, PLANTERS, labelled, make_output, model_answers, pairs
from conf.rephrase import SMALL_STYLES, STYLES, OutputFilterConfig
from data.rephrase.clean import clean
from data.rephrase.filters import FILTERS, REASONS, judge
from data.rephrase.filters.arithmetic import equations
from data.rephrase.filters.copying import copied_share, longest_span
from data.rephrase.filters.facts import names, numbers, spelled
from data.rephrase.filters.support import signs
from data.rephrase.styles import load_styles

LIMITS = OutputFilterConfig()
GOOD = {pair.style.name: pair for pair in pairs()}
SOURCE = GOOD["medium"].source
# filter -> style, what the answer is made from, finish
BAD = {
    "finish": ("medium", "{good}", "length"),
    "refusal": ("medium", "I'm sorry, but I cannot rewrite this. {good}", "stop"),
    "echo": ("medium", "<|im_start|>assistant {good}", "stop"),
    "boilerplate": ("medium", "Here is the rewritten text:\n{good}", "stop"),
    "language": ("medium", "Die Brücke wurde nach sechs Jahren Arbeit eröffnet. Sie ist lang und trägt jeden Tag viele "
                 "Fahrzeuge, weil der Fluss dort tief ist und die Schiffe sonst behindert würden.", "stop"),
    "length": ("medium", "It is so.", "stop"),
    "repetition": ("medium", "{good} The road was long and winding all along. The road was long and winding all along.",
                   "stop"),
    "form": ("qa", "{good}\nQuestion: And what then?", "stop"),
    "topic": ("qa", "Question: Who sings?\nAnswer: Purple elephants do, whenever nobody wants them to.", "stop"),
    "support": ("medium", "This is a bridge. The bridge across the river is a common river bridge, and the common "
                "river bridge is a bridge across the common river.", "stop"),
    "copying": ("medium", "{source}", "stop"),
    "facts": ("medium", "{good} It cost 987654 dollars.", "stop"),
    "gain": ("medium", "words without any ending or order nouns nouns table river stone", "stop"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_catches_its_failure_and_lets_a_good_output_pass(name: str) -> None:
    style, text, finish = BAD[name]
    pair = GOOD[style]
    raw = text.replace("{good}", pair.text).replace("{source}", pair.source)
    assert FILTERS[name].judge(make_output(pair.source, raw, pair.style, finish), LIMITS) in FILTERS[name].REASONS
    assert FILTERS[name].judge(make_output(pair.source, pair.text, pair.style), LIMITS) == ""


def test_reasons_are_distinct() -> None:
    assert len(set(REASONS)) == len(REASONS)


def test_the_labelled_bench_keeps_its_bounds() -> None:
    """At least 1,000 outputs; every planted class is rejected in 95 of 100 cases, good ones in 5 at most."""
    rows = labelled()
    assert len(rows) >= 1000
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.origin != "model":
            found[row.label].append(judge(row.output, LIMITS))
    assert set(found) == {CLEAN, "language", *PLANTERS}
    rejected = {label: sum(map(bool, reasons)) / len(reasons) for label, reasons in found.items()}
    assert rejected.pop(CLEAN) <= 0.05
    assert min(rejected.values()) >= 0.95, rejected
    assert set(OWN) == set(rejected)


def test_failures_of_a_small_model_are_rejected() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for row in model_answers(load_styles([*STYLES, *SMALL_STYLES], [])):
        found[row.label].append(judge(row.output, LIMITS))
    found.pop(CLEAN)  # too few for a share
    rejected = {label: sum(map(bool, reasons)) / len(reasons) for label, reasons in found.items()}
    assert {"copied", "truncated", "invented", "repetition", "form", "echo", "boilerplate"} <= set(rejected)
    assert min(rejected.values()) >= 0.95, rejected


def test_planting_is_the_same_for_the_same_seed() -> None:
    one, two = ([(row.label, row.output.raw) for row in labelled(3, 1)] for _ in range(2))
    assert one == two


def test_clean_takes_what_is_between_the_sentinels() -> None:
    style = load_styles(["medium"], [])["medium"]
    whole = clean('Sure!\n<rewrite>\n"A text."\n</rewrite>\nBye', style)
    assert (whole.text, whole.opened, whole.closed) == ("A text.", True, True)
    assert clean("<rewrite>half", style).closed is False
    assert clean("```markdown\nA text.\n```", style).text == "A text."
    assert clean('"She said" and "he said"', style).text == '"She said" and "he said"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("14 + 2 * 3 = 20", [(20.0, True)]),
        ("It costs 680,000 - 230,000 = 450,000 dollars.", [(450000.0, True)]),
        ("1 / 3 = 0.33 and 2 + 2 = 5", [(0.33, True), (5.0, False)]),
        ("3 kg + 4 kg = 7 kg", [(7.0, True)]),
        ("1 / 0 = 3", [(3.0, False)]),
        ("x = 3", []),
    ],
)
def test_equations(text: str, expected: list[tuple[float, bool]]) -> None:
    assert equations(text) == expected


def test_numbers_and_names() -> None:
    text = (
        "1. In the 1940s Karl von Frisch paid $1,250.50 for 18,000 bees, 12th of March.\n2. The Bees saw Java's K200."
    )
    assert numbers(text) == {1940.0, 1250.5, 18000.0, 12.0, 200.0}
    assert spelled("Twenty of seven, one and zero") == {20.0, 7.0}
    assert names(text) == {"karl", "frisch", "march", "bees", "java", "k200"}


def test_an_output_keeps_content_and_adds_little() -> None:
    pair = GOOD["qa"]
    others = " ".join({other.source for other in pairs()} - {pair.source})
    for text, reason in (("Bees hold meetings.", "lost_content"), (f"{pair.text} {others}", "new_content")):
        assert FILTERS["topic"].judge(make_output(pair.source, text, pair.style), LIMITS) == reason


def test_signs_of_statements_without_support() -> None:
    style = GOOD["medium"].style
    source = (
        'The call "seek" does not close the file. It moves the position, which "tell" returns as a number of bytes.'
    )
    copied = signs(make_output(source, source, style))
    assert copied == pytest.approx(
        {
            "words kept": 1 - style.keep_words,
            "least kept of a sentence": 1 - style.keep_words,
            "longer": 0.0,
            "circles": 0.0,
            "literals lost": 0.0,
            "negations lost": 0.0,
            "words copied": 1.0,
        }
    )
    found = signs(make_output(source, 'Files close by "seek". Files close by the call, and files close by it.', style))
    assert found["circles"] == pytest.approx(math.log(2))  # "files close", of which the source has each word once
    assert found["literals lost"] == pytest.approx(1 / 3)  # of two
    assert found["negations lost"] == 1.0
    assert found["least kept of a sentence"] == pytest.approx(-style.keep_words)  # nothing of the second
    named = signs(make_output('Of "files", "x in s" and "s" all are names.', "A file is a name, x in t too.", style))
    assert named["literals lost"] == pytest.approx(2 / 4)  # of three; the plural is there
    assert signs(make_output(source, f"{source} {source}", style))["longer"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The method `__trunc__()` is what int() falls back to.", ""),
        ("The function trunc() is what int() falls back to.", "new_name"),
        ("Calling list.add_random is what int() does.", "new_name"),
        ("It falls back to __trunc__ and is deprecated.", ""),
    ],
)
def test_code_stands_in_the_source_as_it_is(text: str, reason: str) -> None:
    source = 'The built-in function "int()" falls back to "__trunc__()"; the delegation to "__trunc__()" is deprecated.'
    assert FILTERS["facts"].judge(make_output(source, text, GOOD["medium"].style), LIMITS) == reason


def test_copying_is_counted_in_words() -> None:
    words = "a b c d e f g".split()  # noqa: SIM905
    assert copied_share(words, words) == 1.0
    assert copied_share(words, list(reversed(words))) == 0.0
    assert copied_share(["a"], words) == 0.0
    assert longest_span("x a b c y".split(), words) == 3  # noqa: SIM905


def test_every_style_has_good_examples_that_pass() -> None:
    passed = {pair.style.name for pair in pairs() if not judge(make_output(pair.source, pair.text, pair.style), LIMITS)}
    assert passed == {*STYLES, *SMALL_STYLES}
