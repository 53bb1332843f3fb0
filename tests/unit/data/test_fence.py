"""Workers that outlive their driver make nothing appear; a driver that lives is left alone."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError, ResourceError
from data.fence import OWNER, owned, working
from data.files import APPEARING, write_atomic
from data.stages import Stage, run_stage, unit
from tests.helpers.processes import wait_for_file

HELD = ("one at a time", "wait")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != "." or path.name.endswith(".tmp"))


def test_a_unit_writes_while_its_driver_lives_and_not_afterwards(tmp_path: Path) -> None:
    with owned(tmp_path, *HELD) as token:
        work = {"folder": str(tmp_path), "owner": token}
        with working(work):
            write_atomic(tmp_path / "kept", "1")
    for _ in range(2):  # nobody's folder, then the next driver's
        with working(work), pytest.raises(DataError, match="not this command's any more"):
            write_atomic(tmp_path / "late", "2")
        with owned(tmp_path, *HELD) as other:
            assert other != token
            with working(work), pytest.raises(DataError, match="not this command's any more"):
                write_atomic(tmp_path / "late", "2")
    assert visible(tmp_path) == ["kept"]
    write_atomic(tmp_path / "free", "3")  # outside a unit nobody asks


def test_a_folder_that_is_gone_is_not_made_again_by_a_late_unit(tmp_path: Path) -> None:
    work = {"folder": str(tmp_path / "gone"), "owner": json.dumps(["token", "host"])}
    with working(work), pytest.raises(DataError, match="gone"):
        write_atomic(tmp_path / "elsewhere", "1")


def test_on_another_host_the_token_alone_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owned(tmp_path, *HELD) as token:
        pass
    monkeypatch.setattr("data.fence.this_host", lambda: "another")
    work = {"folder": str(tmp_path), "owner": token}
    with working(work):
        write_atomic(tmp_path / "kept", "1")
    with owned(tmp_path, *HELD), working(work), pytest.raises(DataError):
        write_atomic(tmp_path / "late", "2")


def test_a_new_driver_waits_for_a_rename_and_is_refused_by_a_live_one(tmp_path: Path) -> None:
    with owned(tmp_path, *HELD) as token:
        work = {"folder": str(tmp_path), "owner": token}
        with working(work), APPEARING.get()(), open(tmp_path / OWNER) as owner, pytest.raises(BlockingIOError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ResourceError, match="in use"), owned(tmp_path, *HELD):
            pass
        with working(work):
            write_atomic(tmp_path / "kept", "1")  # the refused driver has changed nothing


@unit
def late_unit(work: dict[str, Any]) -> dict[str, Any]:
    """Waits until the driver is dead, then writes."""
    folder = Path(work["folder"])
    (folder.parent / "started").write_text("1")
    wait_for_file(folder.parent / "driver_is_dead", 60)
    write_atomic(folder / "late", "2")
    return {"files": {}}


def orphan(work: dict[str, Any]) -> None:
    """The worker's process: what becomes of the unit."""
    try:
        late_unit(work)
    except DataError as error:
        write_atomic(Path(work["folder"]).parent / "said", str(error))


def drive(root: Path) -> None:
    """A driver that runs ``late_unit`` in another process."""

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        script = f"from tests.unit.data.test_fence import orphan; orphan({stage.units('late', [{}])[0]!r})"
        subprocess.run([sys.executable, "-c", script], start_new_session=True, check=True)
        return {}, {}

    run_stage(Stage("late", 1, root / "stage", {}), body)


def test_an_orphan_of_a_killed_driver_makes_nothing_appear(tmp_path: Path) -> None:
    script = f"from pathlib import Path; from tests.unit.data.test_fence import drive; drive(Path({str(tmp_path)!r}))"
    driver = subprocess.Popen([sys.executable, "-c", script])
    wait_for_file(tmp_path / "started", 120)
    driver.kill()
    driver.wait(60)
    (tmp_path / "driver_is_dead").write_text("1")
    assert "not this command's" in wait_for_file(tmp_path / "said", 60)
    assert visible(tmp_path / "stage") == ["stage.json"]
