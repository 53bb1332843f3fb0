from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from inference.detokenize import Detokenizer, StopMatcher


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Hardly more than one token a byte, so that characters are spread over tokens."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    train_tokenizer(["the the the and and"], 262, folder)
    return load_tokenizer(folder)


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30).filter(lambda text: "\ufffd" not in text))
def test_characters_are_never_split(tokenizer: Tokenizer, text: str):
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 261), max_size=40))
def test_any_tokens_give_what_decoding_all_of_them_gives(tokenizer: Tokenizer, tokens: list[int]):
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer):
    tokens = tokenizer.encode("\u20ac")
    assert len(tokens) == 3
    assert pieces(tokenizer, tokens) == ["", "", "\u20ac", ""]


def test_bytes_that_form_no_character_come_out_too(tokenizer: Tokenizer):
    (broken,) = [i for i in range(262) if tokenizer.fast.id_to_token(i) == "\u00ff"]  # the byte 0xFF
    found = pieces(tokenizer, [broken] * 20)
    assert "".join(found) == "\ufffd" * 20
    assert "".join(found[:10]) == "\ufffd" * 7


def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizer: Tokenizer):
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return tokenizer.decode(tokens)

    detokenizer = Detokenizer(decode)
    text = "the \u20ac and \U0001f600 " * 50
    assert "".join(detokenizer.push(token) for token in tokenizer.encode(text)) == text
    assert longest <= 12


def cut(text: str, sizes: list[int]) -> list[str]:
    parts = []
    for size in sizes:
        parts.append(text[:size])
        text = text[size:]
    return [*parts, text]


def expected_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Reading character by character, the first stop string that is complete ends the text before itself."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(
    st.text("abc", max_size=25),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=12),
)
def test_stop_strings_however_the_text_is_cut(text: str, stops: list[str], sizes: list[int]):
    matcher, out, stopped = StopMatcher(stops), "", False
    for piece in cut(text, sizes):
        emitted, stopped = matcher.feed(piece)
        out += emitted
        assert expected_stop(text, stops)[0].startswith(out)
        if stopped:
            break
    assert (out + ("" if stopped else matcher.flush()), stopped) == expected_stop(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert matcher.feed("the E") == ("the ", False)
    assert matcher.feed("x") == ("Ex", False)
    assert matcher.feed("EN") == ("", False)
    assert matcher.feed("D of it") == ("", True)
