"""PreSelect, whole, at toy size on one Ray cluster: ladder, score, scorer, selection; and a second time of each."""

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from cluster.connection import connect
from conf.errors import EXIT_CONFIG, EXIT_DONE
from data.manifest import read_manifest
from launch.__main__ import main
from launch.preflight import load_config

SETTINGS = [
    "experiment=preselect_ladder",
    "data.dir=data",
    "data.context=64",
    "data.vocab_size=400",
    "trainer.steps=6",
    "trainer.batch=2",
    "trainer.warmup_steps=1",
    "trainer.checkpoint_every=6",
    "trainer.eval_every=0",
    "ladder.pool_documents=60",
    "preselect.items=4",
    "preselect.buckets=2000",
    "cluster.cpus_per_rank=1",
    "ladder.rungs=[{name: a, mixture: {prose: 1}, documents: 40},"
    "{name: b, mixture: {teaching: 1, site: 1}, documents: 40, steps: 12}]",
]
SELECTION = [
    "curation.preselect.enabled=true",
    "curation.preselect.scorer=data/preselect/scorer",
    "data.overwrite=true",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the ladder is trained and has scored the pool, on a cluster that stays up."""
    folder = tmp_path_factory.mktemp("preselect")
    with chdir(folder), connect(load_config(SETTINGS).cluster):
        for command in ("ladder", "score", "scorer"):
            assert main([command, *SETTINGS]) == EXIT_DONE
        yield folder


def test_ladder_is_a_table_of_exported_models(place: Path) -> None:
    table = yaml.safe_load((place / "data/preselect/ladder.yaml").read_text())
    assert [row["name"] for row in table["models"]] == ["a", "b"]
    for row in table["models"]:
        assert (place / "data/preselect" / row["folder"] / "model.safetensors").is_file()
    assert sorted(path.stem for path in (place / "data/preselect/pool").glob("*.jsonl")) == [
        "prose",
        "repeated",
        "shuffled",
        "site",
        "teaching",
    ]


def test_strengths_of_every_document_and_a_page(place: Path) -> None:
    figures = read_manifest(place / "data/preselect/strength").figures
    assert figures["documents"] == 60
    assert figures["failed"] == {}
    assert [model["source"] for model in figures["models"]] == ["built-in evaluation"] * 2
    assert 0 < figures["positives"] == figures["negatives"]
    assert len(figures["controls"]) == 4
    page = (place / "data/preselect/report.html").read_text()
    for words in ("Ladder, weakest first", "Permuted rankings", "Positives", "Words of most influence"):
        assert words in page


def test_commands_that_are_done_say_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("score", "scorer"):
        assert main([command, *SETTINGS]) == EXIT_DONE
        assert f"{command}: nothing to do" in capsys.readouterr().out
    assert main(["ladder", *SETTINGS]) == EXIT_DONE
    assert "loss" not in capsys.readouterr().out  # no training step ran


def test_selection_keeps_a_share_and_counts_the_rest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", *SETTINGS, *SELECTION, "curation.preselect.keep=0.3"]) == EXIT_DONE
    assert "preselect" in capsys.readouterr().out
    figures = read_manifest(place / "data/curated").figures
    assert 0 < figures["kept"] < 60
    assert figures["dropped"]["preselect"] == 60 - figures["kept"]


def test_a_broken_model_is_left_out_unless_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = place / "data/preselect"
    shutil.copytree(root / "ladder/a/hf", root / "broken")
    (root / "broken/model.safetensors").write_bytes(b"not a model")
    table = yaml.safe_load((root / "ladder.yaml").read_text())
    table["models"] += [{"name": "broken", "folder": "broken"}, {"name": "gone", "folder": "gone"}]
    (root / "other.yaml").write_text(yaml.safe_dump(table))
    other = [*SETTINGS, f"preselect.ladder={root / 'other.yaml'}", "data.overwrite=true"]
    assert main(["score", *other, "preselect.strict=true"]) == EXIT_CONFIG
    printed = capsys.readouterr().err
    assert "broken" in printed
    assert "gone" in printed
    assert "Traceback" not in printed
    known = sorted((root / "cache").rglob("*.parquet"))
    assert main(["score", *other]) == EXIT_DONE
    assert "left out" in capsys.readouterr().out
    figures = read_manifest(root / "strength").figures
    assert set(figures["failed"]) == {"broken", "gone"}
    assert sorted((root / "cache").rglob("*.parquet")) == known != []  # no text was read again


def test_unusable_ladders_are_answered(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(place / f"data/preselect/ladder/{name}/hf") for name in "ab"]
    cases = {
        "different ability": [{"folder": folders[0], "name": "a", "ability": 1}, {"folder": folders[1], "ability": 1}],
        "at least two models": [{"folder": folders[0]}],
        "every model of a ladder has": [{"folder": folders[0], "name": "a", "ability": 1}, {"folder": folders[1]}],
        "finite numbers": [{"folder": folders[0], "ability": "good"}, {"folder": folders[1]}],
    }
    for words, models in cases.items():
        (place / "bad.yaml").write_text(json.dumps({"models": models}))
        code = main(["score", *SETTINGS, f"preselect.ladder={place / 'bad.yaml'}", "data.overwrite=true"])
        printed = capsys.readouterr().err
        assert (code, words in printed) == (EXIT_CONFIG, True), printed
    assert main(["score", *SETTINGS, "preselect.ladder=nowhere.yaml"]) == EXIT_CONFIG
    assert main(["ladder", *SETTINGS, "ladder.rungs=[]"]) == EXIT_CONFIG
    assert main(["curate", *SETTINGS, *SELECTION, "curation.preselect.scorer=nowhere"]) == EXIT_CONFIG
    assert "Traceback" not in capsys.readouterr().err
