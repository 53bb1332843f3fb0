"""Stages: nothing done twice, nothing mixed, nothing of others removed."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError, ResourceError
from data.files import write_atomic
from data.manifest import Manifest, read_manifest, write_manifest
from data.stages import BEGUN, Stage, Unit, collect_files, record_files, run_stage, serial_units, stage_folders, unit
from tests.unit.data.samples import make_config

CALLS: list[int] = []


@unit
def square(work: Unit) -> Unit:
    """Writes the square of a number."""
    CALLS.append(work["number"])
    name = f"square-{work['number']}.txt"
    write_atomic(Path(work["folder"]) / name, str(work["number"] ** 2))
    return {"value": work["number"] ** 2, "files": record_files(work["folder"], [name])}


def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
    work = stage.units("square", [{"number": n} for n in stage.settings["numbers"]])
    results = serial_units("squares", "tests.unit.data.test_stages:square", work)
    return {"sum": sum(r["value"] for r in results)}, collect_files(results)


def make(folder: Path, numbers: list[int], parent: Manifest | None = None, overwrite: bool = False) -> Manifest:
    CALLS.clear()
    return run_stage(Stage("squares", 1, folder, {"numbers": numbers}, parent, overwrite=overwrite), body)


def test_finished_stage_does_nothing(tmp_path: Path) -> None:
    first = make(tmp_path / "s", [2, 3])
    assert (first.figures, first.reused, sorted(CALLS)) == ({"sum": 13}, False, [2, 3])
    again = make(tmp_path / "s", [2, 3])
    assert again.reused
    assert CALLS == []
    assert (again.fingerprint, again.figures, again.files) == (first.fingerprint, first.figures, first.files)
    assert read_manifest(tmp_path / "s") == first


def test_other_settings_are_refused_unless_overwritten(tmp_path: Path) -> None:
    first = make(tmp_path / "s", [2, 3])
    with pytest.raises(DataError, match=r"(?s)numbers.*data\.overwrite=true") as caught:
        make(tmp_path / "s", [2, 4])
    assert first.fingerprint[:16] in str(caught.value)
    assert read_manifest(tmp_path / "s").figures == {"sum": 13}
    assert make(tmp_path / "s", [4], overwrite=True).figures == {"sum": 16}
    assert not (tmp_path / "s" / "square-2.txt").exists()
    assert make(tmp_path / "s", [4], overwrite=True).reused


def test_unfinished_stage_of_other_settings_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "s", [2, 3])
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(DataError, match="made with settings"):
        make(tmp_path / "s", [5])
    assert make(tmp_path / "s", [2, 3]).figures == {"sum": 13}
    assert CALLS == []  # the markers answered


def test_changed_parent_names_both_fingerprints(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", [1]), make(tmp_path / "two", [2])
    child = make(tmp_path / "s", [9], one)
    assert child.parent == one.fingerprint
    assert [entry["fingerprint"] for entry in child.lineage] == [one.fingerprint]
    with pytest.raises(DataError, match="parent") as caught:
        make(tmp_path / "s", [9], two)
    assert one.fingerprint[:16] in str(caught.value)
    assert two.fingerprint[:16] in str(caught.value)


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_lost_file_is_made_again(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "s", [2, 30])
    path = tmp_path / "s" / "square-30.txt"
    if damage == "remove":
        path.unlink()
    else:
        path.write_text("90")
    assert not make(tmp_path / "s", [2, 30]).reused
    assert CALLS == [30]
    assert path.read_text() == "900"


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"thesis\.txt"):
            make(tmp_path / "s", [2], overwrite=overwrite)
    assert (tmp_path / "s" / "thesis.txt").read_text() == "years of work"


def test_folder_of_another_stage_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "s", [2])
    for name in ("manifest.json", "stage.json"):
        with pytest.raises(DataError, match="holds squares"):
            run_stage(Stage("cubes", 1, tmp_path / "s", {}, overwrite=True), body)
        (tmp_path / "s" / name).unlink()
    assert (tmp_path / "s" / "square-2.txt").exists()


def test_killed_overwrite_goes_on(tmp_path: Path) -> None:
    make(tmp_path / "s", [2, 3])
    (tmp_path / "s" / "manifest.json").unlink()
    (tmp_path / "s" / "square-2.txt").unlink()
    assert (tmp_path / "s" / BEGUN).exists()
    assert make(tmp_path / "s", [5], overwrite=True).figures == {"sum": 25}


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    make(tmp_path / "s", [2])
    with open(tmp_path / "s" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="in use"):
            make(tmp_path / "s", [2])
    assert make(tmp_path / "s", [2]).reused


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        make(tmp_path / "file" / "s", [2])


def test_manifest_is_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sundog curate"):
        read_manifest(tmp_path, command="curate")
    (tmp_path / "manifest.json").write_text('{"stage": "x"}')
    with pytest.raises(DataError, match="fingerprint"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="everything"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(tmp_path, Manifest("s", "f", "", {}, {"x": float("inf")}, {}, ""))


def test_folders_follow_the_settings(tmp_path: Path) -> None:
    config = make_config(tmp_path, "corpus")
    folders = stage_folders(config)
    assert folders.packed == tmp_path / "data" / "packed-matching-64"
    assert folders.ordered == tmp_path / "data" / "ordered-matching"
    config.data.dir = "relative"
    assert stage_folders(config).curated.is_absolute()
