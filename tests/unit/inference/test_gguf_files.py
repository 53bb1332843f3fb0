from pathlib import Path

import gguf
import pytest

from conf.errors import DataError
from inference.engine import Engine
from inference.gguf_files import model_folder
from models.hf import load_hf
from tests.helpers.gguf_writer import write_gguf
from tests.unit.inference.builders import make_folder, run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sundog" / "gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny")


def test_a_gguf_file_gives_what_its_folder_gives(folder: Path, tmp_path: Path, cache: Path):
    ours, theirs = Engine(folder), Engine(write_gguf(folder, tmp_path / "files" / "tiny.gguf"))
    text = "the cat sat on the mat. a na\u00efve caf\u00e9 "
    assert theirs.encode(text) == ours.encode(text)
    assert run(theirs, ours.encode(text), max_tokens=30) == run(ours, ours.encode(text), max_tokens=30)
    assert (theirs.context, theirs.eos_ids) == (ours.context, ours.eos_ids)
    (kept,) = cache.iterdir()
    assert model_folder(tmp_path / "files") == model_folder(tmp_path / "files" / "tiny.gguf") == kept


def test_quantised_weights_are_the_ones_that_the_file_stores(folder: Path, tmp_path: Path):
    found = Engine(write_gguf(folder, tmp_path / "tiny.gguf", "Q8_0"))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}["token_embd.weight"]
    weight = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert (load_hf(found.folder).embed.weight.detach().numpy() == weight).all()


def test_reading_a_file_prints_nothing(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model_folder(write_gguf(folder, tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")


def test_a_file_that_has_changed_is_read_again(folder: Path, tmp_path: Path, cache: Path):
    path = tmp_path / "tiny.gguf"
    assert model_folder(write_gguf(folder, path)) != model_folder(write_gguf(folder, path, "Q8_0"))
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_is_none(tmp_path: Path, cache: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"x" * 100)
    with pytest.raises(DataError, match=r"broken\.gguf"):
        Engine(tmp_path / "broken.gguf")
    assert not list(cache.glob("*"))


def test_folders_are_left_as_they_are(folder: Path):
    assert model_folder(folder) == folder
