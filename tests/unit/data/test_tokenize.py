"""The tokenizer: lossless, deterministic, readable by transformers, and safe against texts that name its tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from data.tokenize import END, PAD, Tokenizer, copy_tokenizer, load_tokenizer, train_tokenizer
from tests.unit.data.samples import TOPICS, text

TEXTS = [text(topic, i) for i, topic in enumerate(TOPICS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
def test_any_text_survives(tokenizer: Tokenizer, content: str) -> None:
    tokens = tokenizer.encode(content)
    assert tokenizer.decode(tokens) == content
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.encode_batch([content, "x"]) == [tokens, tokenizer.encode("x")]


def test_training_compresses_and_respects_the_size(tokenizer: Tokenizer) -> None:
    assert 258 < tokenizer.vocab_size <= 400
    assert sum(len(tokenizer.encode(t)) for t in TEXTS) < 0.5 * sum(map(len, TEXTS))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 1)


def test_names_of_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    content = f"a {END} b {PAD}"
    tokens = tokenizer.encode(content)
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokens)
    assert tokenizer.decode(tokens) == content
    assert tokenizer.encode(END, allow_special=True) == [tokenizer.eos_id]
    assert tokenizer.encode_batch([content]) == [tokens]
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == END


def test_same_texts_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "from tests.unit.data.test_tokenize import TEXTS, train_tokenizer\n"
        f"train_tokenizer(iter(TEXTS), 400, {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[3])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_transformers_reads_the_folder(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(folder)
    sample = "Bread ovens,  steam\n\tengines."
    assert other(sample).input_ids == tokenizer.encode(sample)
    assert other.decode(tokenizer.encode(sample)) == sample
    assert (other.eos_token_id, other.bos_token_id, other.pad_token_id) == (0, 0, 1)


def test_copy_keeps_the_digest_and_names_the_tokens(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    copy_tokenizer(tmp_path / "given" / "tokenizer.json", tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.digest, copy.eos_id, copy.pad_id) == (tokenizer.digest, 0, 1)
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["eos_token"] == END


def test_settings_name_the_end_token(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": PAD}, "pad_token": None}))
    assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<absent>"}))
    with pytest.raises(DataError, match="ends a document"):
        load_tokenizer(tmp_path)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        load_tokenizer(tmp_path)
    for content in ("not json", '{"model": {}}', ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match="Hugging Face"):
            load_tokenizer(tmp_path)
