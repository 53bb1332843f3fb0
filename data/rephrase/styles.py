"""Styles: how a chunk is asked to be rephrased, each a versioned YAML file.

The built-in ones are beside this module: the four of WRAP (easy, medium, hard, qa) and the four formats that FinePhrase
(arXiv 2604.13977) found best (faq, math, table, tutorial); concise and formal ask for what a very small model can do.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.errors import DataError
from conf.rephrase import SMALL_STYLES, STYLES
from data.files import digest_json

FOLDER = Path(__file__).parent / "styles"
FORMS = ("prose", "dialogue", "faq", "problem", "table", "steps")
BUCKETS = ("low", "medium", "high")
ASKED = ("name", "version", "system", "template", "begin", "end", "max_tokens")  # fields that decide an answer
ROUTED = ("quality", "needs_numbers", "source_tokens")  # fields that decide what is asked
SHARES = ("max_copied", "keep_facts", "keep_words", "known_words")
PLACES = ("{text}", "{begin}", "{end}")


@dataclass(frozen=True)
class Style:
    """One style; a file gives every field and no other."""

    name: str
    version: int
    system: str
    template: str  # holds {text}, and {begin} and {end} where there are sentinels
    begin: str  # sentinels around the answer; both empty for a model that does not keep to them
    end: str
    form: str  # what data/rephrase/filters/form.py demands
    quality: tuple[str, ...]  # buckets of the sources it suits
    needs_numbers: bool  # a source must hold two numbers at least
    source_tokens: tuple[int, int]  # least and most tokens of a source
    max_tokens: int  # of the output; what the band of lengths allows is less for most sources
    length_ratio: tuple[float, float]  # least and most tokens of the output to those of the source
    max_copied: float  # share of the output's word 4-grams that the source has
    max_span: int  # words in a row of the output that the source has; 0: as many as there are
    keep_facts: float  # share of the source's numbers, and of its names, that the output has
    keep_words: float  # share of the source's content words that the output has, endings aside
    known_words: float  # share of the output's content words that the source has; of all forms but prose

    @property
    def digest(self) -> str:
        """Of what decides an answer: another digest is another prompt version. What answers are judged by is not."""
        return digest_json([getattr(self, name) for name in ASKED])[:16]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The chat that asks for a rephrase of ``text``."""
        asked = self.template.replace("{begin}", self.begin).replace("{end}", self.end).replace("{text}", text)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": asked}]


def load_style(path: str | Path) -> Style:
    """The style of a file. Raises DataError that names the field that is missing, unknown or wrong."""
    path = Path(path).expanduser()
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(str(path), str(error)[:200], "a style is a YAML file", "check rephrase.style_files") from error
    names = [item.name for item in dataclasses.fields(Style)]
    given = list(found) if isinstance(found, dict) else []
    for problem, wrong in (
        ("no field", [name for name in names if name not in given]),
        ("unknown field", [name for name in given if name not in names]),
    ):
        if wrong:
            rule = f"a style has the fields {', '.join(names)}"
            raise DataError(str(path), f"{problem} {', '.join(map(str, wrong))}", rule, f"compare {FOLDER}/medium.yaml")
    for name, holds, rule in _rules(found):
        if not holds:
            raise DataError(f"{path}: {name}", found[name], rule, f"compare {FOLDER}/medium.yaml")
    return style_of(found)


def style_of(tree: dict[str, Any]) -> Style:
    """The style behind its fields as JSON or YAML has them."""
    return Style(**{**tree, **{name: tuple(tree[name]) for name in ("quality", "source_tokens", "length_ratio")}})


def _rules(found: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """What must hold of the fields: name, whether it does, the rule."""

    def is_number(value: Any, kind: Any = (int, float)) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and value >= 0

    def is_band(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]

    template, begin, end = (found[n] if isinstance(found[n], str) else "" for n in ("template", "begin", "end"))
    buckets = found["quality"] if isinstance(found["quality"], list) else []
    places = PLACES if begin else PLACES[:1]
    return [
        *((n, isinstance(found[n], str) and found[n].strip() != "", "a text") for n in ("name", "system", "template")),
        ("end", isinstance(found["begin"], str) and isinstance(found["end"], str), "begin and end are texts"),
        ("end", bool(begin) == bool(end), "both sentinels, or neither"),
        ("template", all(place in template for place in places), f"it holds {', '.join(places)}"),
        ("version", is_number(found["version"], int), "a whole number"),
        ("form", found["form"] in FORMS, f"one of {', '.join(FORMS)}"),
        ("quality", bool(buckets) and set(buckets) <= set(BUCKETS), f"a list of {', '.join(BUCKETS)}"),
        ("needs_numbers", isinstance(found["needs_numbers"], bool), "true or false"),
        ("source_tokens", is_band(found["source_tokens"]), "two numbers, the least and the most"),
        ("length_ratio", is_band(found["length_ratio"]), "two numbers, the least and the most"),
        ("max_tokens", is_number(found["max_tokens"], int) and found["max_tokens"] > 0, "a whole number above 0"),
        *((n, is_number(found[n]) and found[n] <= 1, "a share from 0 to 1") for n in SHARES),
        ("max_span", is_number(found["max_span"], int), "a whole number, 0 for no limit"),
    ]


def load_styles(names: list[str], files: list[str]) -> dict[str, Style]:
    """The styles that a run uses: the named ones, from ``files`` where one of them has the name, else built in.

    Raises DataError for a broken file and for a name that neither has.
    """
    own = {style.name: style for style in map(load_style, files)}
    known = {name: FOLDER / f"{name}.yaml" for name in (*STYLES, *SMALL_STYLES)}
    if unknown := [name for name in names if name not in own and name not in known]:
        rule = f"a style is one of {', '.join([*known, *(n for n in own if n not in known)])}"
        raise DataError("rephrase.styles", ", ".join(unknown), rule, "name its file in rephrase.style_files")
    return {
        name: own[name] if name in own else load_style(known[name])
        for name in [*names, *(n for n in own if n not in names)]
    }
