"""Chunks, styles and the cache of answers, one by one."""

import dataclasses
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError, ResourceError
from conf.rephrase import SMALL_STYLES, STYLES, RephraseConfig, check_rephrase
from data.rephrase.chunks import SLACK, chunk, sentences
from data.rephrase.prepare import code_share, counter
from data.rephrase.quality import rating
from data.rephrase.store import SHARDS, Store, shard_of
from data.rephrase.styles import FOLDER, load_style, load_styles

TEXT = (
    'Dr. Miller met J. Smith at 3 p.m. yesterday. "It is late," she said. He paid 3.50 dollars!\n\nA new paragraph\n'
    "- one thing\n- another thing\nends here... and goes on. Done?"
)


def words(text: str) -> int:
    return len(text.split())


def test_sentences_end_where_english_ends_them() -> None:
    assert [TEXT[start:end] for start, end in sentences(TEXT)] == [
        "Dr. Miller met J. Smith at 3 p.m. yesterday.",
        '"It is late," she said.',
        "He paid 3.50 dollars!",
        "A new paragraph",
        "- one thing",
        "- another thing\nends here... and goes on.",
        "Done?",
    ]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab. \n!?A", max_size=300), st.integers(1, 20))
def test_chunks_cover_a_text_in_order_and_keep_their_size(text: str, size: int) -> None:
    spans = chunk(text, size, words)
    place = 0
    for span in spans:
        assert text[place : span.start].strip() == ""
        assert text[span.start : span.end].strip() == text[span.start : span.end] != ""
        assert words(text[span.start : span.end]) <= max(1, size * SLACK)
        place = span.end
    assert text[place:].strip() == ""


def test_chunks_are_of_even_size() -> None:
    text = " ".join(f"Sentence number {i} has six words." for i in range(100))
    sizes = [span.tokens for span in chunk(text, 150, words)]
    assert sum(sizes) == 600
    assert max(sizes) <= 168
    assert min(sizes) >= 120


def test_without_a_tokenizer_four_bytes_are_a_token() -> None:
    assert [counter("")(text) for text in ("", "a", "abcd", "abcde")] == [0, 1, 1, 2]


def test_code_is_told_from_prose() -> None:
    assert code_share("import os\n\n\ndef f(x):\n    return x + 1\n\nprint(f(2))\n") >= 0.75
    assert code_share("The import of wine rose.\nIt was a class of its own, for all that.") == 0.0


def test_rating_prefers_prose() -> None:
    good = (
        "The bridge was opened in the spring, and it is still in use today. Many people cross it on their way to work."
    )
    assert rating(good) > 0.8
    for bad in ("", good.upper(), "bridge spring use today people way work cross", good.lower().replace(".", "")):
        assert rating(bad) < 0.5
    assert rating("| a | b |\n|---|---|\n") == 1.0


@pytest.mark.parametrize("name", [*STYLES, *SMALL_STYLES])
def test_a_built_in_style_loads_and_asks(name: str) -> None:
    style = load_styles([name], [])[name]
    assert style.name == name
    asked = style.messages("Some {text} here.")[1]["content"]
    assert "Some {text} here." in asked
    assert "{begin}" not in asked
    assert style.begin in asked


@pytest.mark.parametrize("missing", [field.name for field in dataclasses.fields(load_style(FOLDER / "qa.yaml"))])
def test_a_style_without_a_field_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    fields = yaml.safe_load((FOLDER / "qa.yaml").read_text())
    del fields[missing]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(DataError, match=missing):
        load_style(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "poem"}, "form"),
        ({"extra": 1}, "extra"),
        ({"template": "no place"}, "template"),
        ({"length_ratio": [2, 1]}, "length_ratio"),
        ({"quality": ["best"]}, "quality"),
        ({"begin": ""}, "end"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, change: dict[str, object], said: str) -> None:
    fields = yaml.safe_load((FOLDER / "qa.yaml").read_text()) | change
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(DataError, match=said):
        load_style(tmp_path / "own.yaml")


def test_own_styles_join_and_replace_built_in_ones(tmp_path: Path) -> None:
    fields = yaml.safe_load((FOLDER / "qa.yaml").read_text()) | {"max_tokens": 5}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(fields))
    assert load_styles(["easy", "qa"], [str(tmp_path / "own.yaml")])["qa"].max_tokens == 5
    with pytest.raises(DataError, match="poem"):
        load_styles(["poem"], [])


def test_a_changed_style_is_another_prompt_version() -> None:
    style = load_style(FOLDER / "qa.yaml")
    assert style.digest != dataclasses.replace(style, template=style.template + " ").digest
    judged_otherwise = dataclasses.replace(style, length_ratio=(0.1, 9.0), max_copied=0.1, keep_facts=0.0)
    assert style.digest == judged_otherwise.digest


def test_the_store_keeps_the_first_answer_across_openings(tmp_path: Path) -> None:
    names = [f"{i:x}{i:03x}" for i in range(SHARDS)]
    with Store(tmp_path, range(SHARDS)) as store:
        for name in names:
            store.put({name: {"text": name}})
        store.put({names[0]: {"text": "second"}})
    with Store(tmp_path) as store:
        assert store.get([*names, "f999"]) == {name: {"text": name} for name in names}
    assert {shard_of(name) for name in names} == set(range(SHARDS))


def test_two_writers_of_a_shard_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path, [3]):
        program = (
            "import sys; import data.rephrase.store as s; s.LOCK_SEC = 0.1\n"
            f"with s.Store({str(tmp_path)!r}, [4]): pass\n"
            f"with s.Store({str(tmp_path)!r}, [3]): pass\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ResourceError.__name__ in done.stderr
    assert "answers-03" in done.stderr


def test_a_killed_writer_loses_nothing_that_was_put(tmp_path: Path) -> None:
    program = (
        "import os; from data.rephrase.store import Store\n"
        f"store = Store({str(tmp_path)!r}, [1]).__enter__()\n"
        "for i in range(50): store.put({f'1{i:03x}': {'text': str(i)}})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=60)
    with Store(tmp_path, [1]) as store:
        assert len(store.get([f"1{i:03x}" for i in range(50)])) == 50


def test_a_broken_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers-01.sqlite").write_bytes(b"no database" * 100)
    with (
        pytest.raises((DataError, sqlite3.DatabaseError), match=r"answers-01|not a database"),
        Store(tmp_path) as store,
    ):
        store.get(["1abc"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", 1.0),
        ("share", -0.1),
        ("slots", 0),
        ("low", 0.8),
        ("styles", []),
        ("endpoint", "localhost"),
        ("top_p", 0),
    ],
)
def test_a_setting_out_of_range_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"rephrase.{key}"):
        check_rephrase(dataclasses.replace(RephraseConfig(), **{key: value}))  # pyright: ignore[reportArgumentType]
