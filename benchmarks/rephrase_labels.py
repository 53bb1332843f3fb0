"""Labelled outputs for the filters of data/rephrase: good ones by hand, failures planted in them, a small model's own.

``rephrase_data/clean_a.yaml`` was at hand when patterns and thresholds were chosen, ``clean_b.yaml`` was not. Good ones
of chunks of the default corpus are in ``clean_docs.jsonl``. Answers of SmolLM2-135M-Instruct to the sources of the
first are in ``real.jsonl``, to chunks of the corpus in ``docs.jsonl`` (both with excerpts of the Python documentation,
(c) Python Software Foundation, PSF License Version 2); a reader labelled each before looking at what a filter says of
it. Every line names its half: a was at hand, b was labelled when nothing was changed any more.
"""

# ruff: noqa: SIM905 - a list of words is read as words
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.rephrase import SMALL_STYLES, STYLES
from data.rephrase.clean import clean
from data.rephrase.filters import Output
from data.rephrase.prepare import counter
from data.rephrase.quality import rating
from data.rephrase.styles import Style, load_styles
from data.steps.language import detect

DATA = Path(__file__).parent / "rephrase_data"
CLEAN = "clean"
OTHER_NAMES = {
    "Ruth Calloway": "Anna Pemberton", "Norwick": "Sedgeham", "Elmstead": "Thornbury", "Marta": "Elena",
    "Frisch": "Baumann", "Larkfield": "Ashcombe", "Orrin": "Velden", "Sella": "Corva", "St Gall": "St Blaise",
    "Edric": "Godwin", "Osmund Vale": "Piers Holt", "Tarn Hill": "Crow Moor", "Kestrel": "Raven", "Merapi": "Krakatoa",
    "Java": "Sumatra", "Ada Winfield": "Clara Boswell", "Port Darby": "Port Selwyn", "Moreau": "Lindqvist",
    "Tel Arish": "Tel Dovan", "Alden": "Hartwell", "Brenton": "Calverton", "Lena Ortiz": "Paula Nunez",
    "Greg": "Victor", "Maple": "Walnut", "Fenwick": "Oakhurst", "Python": "Haskell",
}  # fmt: skip
OPENINGS = (
    "Sure! Here is the rewritten text:\n\n",
    "Here is a paraphrase of the text:\n",
    "Certainly. ",
    "Below is the rewritten version.\n\n",
    "Rewritten text: ",
    "The following is a summary of the passage.\n\n",
    "Of course! I have rewritten the text for you.\n\n",
    "Here's the new version you asked for:\n\n",
    "This is the rewritten passage:\n",
    "Okay, let me rewrite that.\n\n",
)

CLOSINGS = (
    "\n\nNote: I changed some words to make it clearer.",
    "\n\nI hope this helps!",
    "\n\nExplanation: I simplified the text.",
    "\n\nLet me know if you would like another version.",
    "\n\nThis rewritten version keeps all facts of the original text.",
    "\n\nFeel free to ask if you need anything else.",
    "\n\nIs there anything else I can do for you?",
    "\n\nI rewrote the text in simple words.",
)

REFUSALS = (
    "I'm sorry, but I cannot rewrite this text.",
    "As an AI language model, I am not able to verify these facts.",
    "I apologize, but the provided text is too short to be rewritten.",
    "Please provide the text that you want me to rewrite.",
    "I'm afraid I can't help with that request.",
    "I cannot assist with rewriting copyrighted material.",
    "Sorry, I do not have access to the text. Could you share the paragraph again?",
    "I am an AI assistant and I do not have opinions on it.",
)

ROLES = (
    "<|im_start|>assistant\n",
    "Assistant: ",
    "user: thanks\nassistant: ",
    "[/INST] ",
    "### Instruction:\n",
    "Text: ",
    "Document: ",
)


@dataclass(frozen=True)
class Labelled:
    """An output and its label: ``clean`` or a class of failure; ``origin``: hand, joined, planted or model."""

    label: str
    origin: str
    output: Output
    held_out: bool


@dataclass(frozen=True)
class Pair:
    source: str
    style: Style
    text: str
    held_out: bool


def make_output(source: str, raw: str, style: Style, finish: str = "stop") -> Output:
    """What the filters see of an answer; tokens by bytes, as without a tokenizer."""
    text, count = clean(raw, style).text, counter("")
    return Output(
        source, raw, finish, style, count(source), count(text), detect(source)[0], rating(source), rating(text)
    )


def pairs() -> list[Pair]:
    """The rephrases that were written by hand."""
    styles = load_styles([*STYLES, *SMALL_STYLES], [])
    whole = [
        Pair(entry["source"], styles[name], text, file == "clean_b")
        for file in ("clean_a", "clean_b")
        for entry in _read(f"{file}.yaml")
        for name, text in entry.items()
        if name != "source"
    ]
    short = _lines("clean_docs.jsonl")
    return whole + [Pair(row["text"], styles[row["style"]], row["written"], row["half"] == "b") for row in short]


def _read(name: str) -> list[dict[str, Any]]:
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def joined(draw: random.Random, written: list[Pair], count: int) -> Iterator[Pair]:
    """Further good ones: two sources and their rephrases of one style, one after the other."""
    fitting = [pair for pair in written if pair.style.form in ("prose", "dialogue", "faq")]
    while count:
        one, two = draw.sample(fitting, 2)
        if one.style == two.style and one.held_out == two.held_out and one.source != two.source:
            between = "\n" if one.style.form == "dialogue" else "\n\n"
            yield Pair(f"{one.source}\n\n{two.source}", one.style, one.text + between + two.text, one.held_out)
            count -= 1


def wrapped(draw: random.Random, text: str, style: Style) -> str:
    """As a model may answer: with both sentinels more often than without."""
    return f"{style.begin}\n{text}\n{style.end}" if draw.random() < 0.7 else text


# Planting: (draw, pair) -> (raw answer, finish reason), or None where the failure does not fit the pair.
Planted = tuple[str, str] | None


def truncated(draw: random.Random, pair: Pair) -> Planted:
    words = list(re.finditer(r"\S+", pair.text))
    last = draw.choice([word for word in words[len(words) // 2 : -2] if word.group()[-1].isalnum()])
    raw = f"{pair.style.begin}\n{pair.text[: last.end()]}"
    return raw, draw.choice(["length", "stop"])


def boilerplate(draw: random.Random, pair: Pair) -> Planted:
    at_start = draw.random() < 0.5
    text = draw.choice(OPENINGS) + pair.text if at_start else pair.text + draw.choice(CLOSINGS)
    return wrapped(draw, text, pair.style), "stop"


def refusal(draw: random.Random, pair: Pair) -> Planted:
    said = draw.choice(REFUSALS)
    return wrapped(draw, draw.choice([said, f"{said} {pair.text}", f"{pair.text}\n\n{said}"]), pair.style), "stop"


def echo(draw: random.Random, pair: Pair) -> Planted:
    asked = pair.style.messages(pair.source)
    prompt = asked[1]["content"].split("\n\n")[0] if pair.style.begin else asked[0]["content"]
    lines = re.split(r"(?<=\.) ", " ".join(prompt.split()))
    text = draw.choice([f"{draw.choice(lines)}\n{pair.text}", draw.choice(ROLES) + pair.text])
    return text, "stop"


def other_length(draw: random.Random, pair: Pair) -> Planted:
    least, most = pair.style.length_ratio
    if pair.style.form != "prose":
        return None
    found = re.split(r"(?<=[.!?]) ", pair.text)
    short = found[0]
    if draw.random() < 0.5 and len(short) < 0.9 * least * len(pair.source):
        return wrapped(draw, short, pair.style), "stop"
    pad = [s for other in pairs() if other.source != pair.source and other.style.form == "prose" for s in [other.text]]
    text = pair.text
    while len(text) < 1.1 * most * len(pair.source):
        text += " " + draw.choice(pad)
    return wrapped(draw, text, pair.style), "stop"


def repetition(draw: random.Random, pair: Pair) -> Planted:
    found = [s for s in re.split(r"(?<=[.!?])\s+", pair.text) if len(s.split()) >= 4 and not s.startswith("|")]
    if not found:
        return None
    again = draw.choice(found)
    times = draw.randrange(3, 7)
    return wrapped(draw, pair.text + "\n" + "\n".join([again] * times), pair.style), "stop"


def form(draw: random.Random, pair: Pair) -> Planted:
    text = pair.text
    match pair.style.form:
        case "dialogue":
            answers = [m.start() for m in re.finditer("Answer:", text)]
            cut = draw.choice(answers)
            text = draw.choice(
                [
                    re.sub("(?m)^(Question|Answer): ", "", text),
                    text[:cut] + text[cut + 8 :],
                    text.replace("Answer:", "-"),
                ]
            )
        case "faq":
            text = draw.choice([text.replace("?", "."), re.sub(r"\?\n(.|\n)*?(\n\n|\Z)", "?\n\n", text)])
        case "problem":
            text = draw.choice(
                [
                    text.replace("Solution:", ""),
                    text.replace("Problem:", "Question:"),
                    re.sub(r" = [\d,.]*\d", "", text),
                ]
            )
        case "table":
            rows = text.splitlines()
            text = draw.choice(
                [
                    "\n".join([rows[0], *rows[2:]]),
                    "\n".join([*rows[:2], rows[2] + " extra |", *rows[3:]]),
                    text.replace("|", " "),
                ]
            )
        case "steps":
            text = draw.choice([re.sub(r"(?m)^\d+\. ", "", text), re.sub(r"(?m)^2\. ", "4. ", text)])
        case _:
            text = "\n".join(f"- {s}" for s in re.split(r"(?<=[.!?]) ", text))
    return wrapped(draw, text, pair.style), "stop"


def copied(draw: random.Random, pair: Pair) -> Planted:
    if pair.style.form != "prose":
        return None
    words = pair.source.split()
    if draw.random() < 0.6:  # a few words are left out
        for _ in range(max(1, len(words) // 40)):
            del words[draw.randrange(1, len(words) - 1)]
    return wrapped(draw, " ".join(words), pair.style), "stop"


def other_number(draw: random.Random, pair: Pair) -> Planted:
    given = set(re.findall(r"\d+", pair.source))
    lines = {m.start() for m in re.finditer(r"(?m)^\s*\d+\.", pair.text)}
    places = [
        m for m in re.finditer(r"(?<![\d.,])\d[\d,.]*\d|(?<![\d.,\w])\d(?![\d.,])", pair.text) if m.start() not in lines
    ]
    if not places:
        return None
    place = draw.choice(places)
    while True:
        digits = "".join(draw.choice("123456789") if c.isdigit() and draw.random() < 0.7 else c for c in place.group())
        if digits != place.group() and re.findall(r"\d+", digits)[0] not in given and digits not in pair.source:
            break
    return wrapped(draw, pair.text[: place.start()] + digits + pair.text[place.end() :], pair.style), "stop"


def other_name(draw: random.Random, pair: Pair) -> Planted:
    fitting = [name for name in OTHER_NAMES if re.search(rf"\b{name}\b", pair.text)]
    if not fitting:
        return None
    name = draw.choice(fitting)
    return wrapped(draw, re.sub(rf"\b{name}\b", OTHER_NAMES[name], pair.text), pair.style), "stop"


def low_quality(draw: random.Random, pair: Pair) -> Planted:
    if pair.style.form != "prose":
        return None
    words = [w for w in re.findall(r"[\w,.$:/()+-]+", pair.text) if w.lower() not in _SMALL]
    text = draw.choice(
        [" ".join(words).replace(".", "") + ".", ", ".join(w.strip(".,") for w in words) + ".", pair.text.upper()]
    )
    return wrapped(draw, text.lower() if text != pair.text.upper() else text, pair.style), "stop"


_SMALL = frozenset(
    "the a an of to in on at and or but for with by as is are was were be been it its that which this from not".split()
)
PLANTERS: dict[str, Callable[[random.Random, Pair], Planted]] = {
    "truncated": truncated, "boilerplate": boilerplate, "refusal": refusal, "echo": echo, "length": other_length,
    "repetition": repetition, "form": form, "copied": copied, "number": other_number, "name": other_name,
    "low_quality": low_quality,
}  # fmt: skip
OWN = {  # reasons that name a class
    "truncated": {"truncated", "empty"}, "boilerplate": {"boilerplate"}, "refusal": {"refusal"}, "echo": {"echo"},
    "length": {"short", "long"}, "repetition": {"repetition"}, "form": {"form"}, "copied": {"copied"},
    "number": {"new_number", "wrong_arithmetic"}, "name": {"new_name", "lost_names"},
    "low_quality": {"low_quality", "no_gain"}, "language": {"other_language"},
}  # fmt: skip


def planted(draw: random.Random, written: list[Pair], rounds: int) -> Iterator[Labelled]:
    """Failures of every class in every rephrase that they fit, ``rounds`` of each."""
    for label, plant in PLANTERS.items():
        for pair in written:
            for _ in range(rounds):
                if (made := plant(draw, pair)) is not None:
                    output = make_output(pair.source, made[0], pair.style, made[1])
                    yield Labelled(label, "planted", output, pair.held_out)


def foreign(draw: random.Random, styles: dict[str, Style]) -> Iterator[Labelled]:
    """Rephrases in another language, whole and by their first part."""
    sources = [entry["source"] for entry in _read("clean_a.yaml")]
    for index, entry in enumerate(_read("foreign.yaml")):
        for name in ("easy", "medium", "hard"):
            sentences = re.split(r"(?<=\.) ", entry["text"])
            text = " ".join(sentences[: draw.randrange(2, len(sentences) + 1)])
            output = make_output(sources[entry["of"]], wrapped(draw, text, styles[name]), styles[name])
            yield Labelled("language", "planted", output, index % 2 == 1)


def model_answers(styles: dict[str, Style]) -> Iterator[Labelled]:
    """Answers of the small model, by their reader's label."""
    for number, row in enumerate(_lines("real.jsonl")):
        file = row.get("source", "clean_a")
        source = _read(f"{file}.yaml")[row["of"]]["source"]
        output = make_output(source, row["raw"], styles[row["style"]], row["finish"])
        yield Labelled(row["label"], "model", output, file == "clean_b" or number % 2 == 1)
    for row in _lines("docs.jsonl"):
        output = make_output(row["text"], row["raw"], styles[row["style"]], row["finish"])
        yield Labelled(row["label"], "model", output, row["half"] == "b")


def labelled(seed: int = 0, rounds: int = 2) -> list[Labelled]:
    """All of them; another seed plants otherwise."""
    draw, written, styles = random.Random(seed), pairs(), load_styles([*STYLES, *SMALL_STYLES], [])
    good = [(pair, "hand") for pair in written] + [(pair, "joined") for pair in joined(draw, written, 200)]
    found = [
        Labelled(CLEAN, origin, make_output(p.source, wrapped(draw, p.text, p.style), p.style), p.held_out)
        for p, origin in good
    ]
    return [*found, *planted(draw, written, rounds), *foreign(draw, styles), *model_answers(styles)]
