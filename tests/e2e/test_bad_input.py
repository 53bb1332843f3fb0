"""What a user gets wrong ends with a clear error, the right exit code and nothing half written."""

import gzip
from pathlib import Path

import pytest

from tests.helpers.cli import prepare_data, sundog, write_corpus

TINY = [
    "data=path",
    "data.context=64",
    "data.vocab_size=300",
    "model=tiny",
    "trainer.steps=2",
    "trainer.warmup_steps=0",
]


def refuse(arguments: list[str], cwd: Path, code: int, said: str) -> None:
    done = sundog(*arguments, cwd=cwd)
    assert done.code == code, done.out + done.err
    assert said in done.err, done.err
    assert "Traceback" not in done.err
    assert "rule:" in done.err
    assert "fix:" in done.err


def test_missing_path(tmp_path: Path) -> None:
    refuse(["curate", *TINY, "data.path=nowhere"], tmp_path, 2, "nowhere")


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    refuse(["curate", *TINY, "data.path=corpus"], tmp_path, 2, "corpus")


def test_corpus_without_a_usable_document(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:60])
    refuse(["curate", *TINY, "data.path=corpus"], tmp_path, 2, "document")
    assert not (tmp_path / "runs/data/corpus/curated/manifest.json").exists()


def test_bad_files_among_good_ones_are_counted(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 40)
    (corpus / "zz.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100000)[:200])
    (corpus / "long.txt").write_text("word " * 2_000_000)
    done = sundog("curate", *TINY, "data.path=corpus", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "dropped, by reason" in done.out
    assert "40 kept" in done.out


@pytest.mark.parametrize("command", ["order", "pack", "train"])
def test_stage_before_its_parent_says_which_to_run(command: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 4)
    refuse([command, *TINY, "data.path=corpus"], tmp_path, 2, "sundog")


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 4)
    (tmp_path / "runs").write_text("a file where the folder should be")
    done = sundog("curate", *TINY, "data.path=corpus", cwd=tmp_path)
    assert done.code in (2, 3)
    assert "runs" in done.err
    assert "Traceback" not in done.err


def test_wrong_ray_address(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 4)
    refuse(["curate", *TINY, "data.path=corpus", "cluster.address=127.0.0.1:9"], tmp_path, 3, "127.0.0.1:9")


def test_more_ranks_than_cpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 40)
    prepare_data(tmp_path, [*TINY, "data.path=corpus"])
    many = ["cluster.ranks=512", "sequence.degree=1", "trainer.batch=512"]
    refuse(["train", *TINY, "data.path=corpus", *many], tmp_path, 3, "512")


def test_context_that_ranks_do_not_divide(tmp_path: Path) -> None:
    refuse(["train", *TINY, "data.path=x", "data.context=66"], tmp_path, 2, "data.context")
