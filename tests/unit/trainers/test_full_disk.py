"""A disk that fills up while a run writes to it: a small file system of its own (root), really full."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ResourceError
from tests.distributed.training_runs import Recorder, curve, make_config, make_data
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints, step_of
from trainers.journal import Journal, read_journal
from trainers.pretrain import run
from trainers.saver import MAX_UNSAVED

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
STEPS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose ``runs`` is a file system of 16 MiB."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder / "runs")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no privilege to mount")
    make_data(make_config(folder, "data"))
    yield folder
    subprocess.run(["umount", str(folder / "runs")], check=True)


def fill(path: Path) -> None:
    """Write until the file system takes no more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


class Filler(Recorder):
    """Fills the disk once there is a checkpoint and empties it after some warnings."""

    def __init__(self, folder: Path, warnings: int) -> None:
        super().__init__()
        self._file, self._warnings = folder / "filler", warnings

    def emit(self, event: dict[str, Any]) -> None:
        super().emit(event)
        if event["kind"] == "checkpoint" and event["step"] == 2:
            fill(self._file)
        if "WARNING" in event.get("message", ""):
            self._warnings -= 1
            if self._warnings == 0:
                self._file.unlink()


def settings(**changes: Any) -> dict[str, Any]:
    every = {"trainer__steps": STEPS, "trainer__checkpoint_every": 2, "trainer__log_every": 1, "trainer__eval_every": 0}
    return every | changes


def test_a_full_disk_costs_checkpoints_and_nothing_else(root: Path) -> None:
    undisturbed = make_config(root, "undisturbed", **settings())
    run(undisturbed, Recorder())
    config = make_config(root, "full", **settings())
    control = Filler(root / "runs", warnings=2)
    assert run(config, control)["status"] == "done"
    assert curve(config) == curve(undisturbed)
    said = [event["message"] for event in control.events if event["kind"] == "log" and "WARNING" in event["message"]]
    assert [line.partition(",")[0] for line in said] == [f"WARNING: no checkpoint after step {step}" for step in (4, 6)]
    assert all("No space left on device" in line for line in said)
    saved = [event["step"] for event in control.events if event["kind"] == "checkpoint"]
    assert saved == [2, 8, 10, 12]


def test_a_disk_that_stays_full_ends_the_run_and_the_same_command_goes_on(root: Path) -> None:
    config = make_config(root, "stuck", **settings())
    with pytest.raises(ResourceError, match="No space left on device"):
        run(config, Filler(root / "runs", warnings=MAX_UNSAVED + 1))
    (root / "runs" / "filler").unlink()
    folder = checkpoints_folder(config.run_dir)
    assert [step_of(path) for path in complete_checkpoints(folder)] == [2]
    assert MAX_UNSAVED == 3, "checkpoints after steps 4, 6 and 8 may fail, that after 10 ends the run"
    assert len(curve(config)) <= STEPS
    again = Recorder()
    assert run(config, again)["resumed_from"] == 2
    assert len(curve(config)) == STEPS


def test_records_wait_in_memory_for_room(root: Path) -> None:
    path, filler = root / "runs" / "waiting" / "metrics.jsonl", root / "runs" / "filler"
    journal = Journal(path, 0)
    journal.write(1, {"train/loss": 0.5})
    fill(filler)
    for step in range(2, 200):
        journal.write(step, {"train/loss": 0.5})
    with pytest.raises(OSError, match="No space"):
        journal.sync()
    assert 1 <= len(read_journal(path)) < 199
    filler.unlink()
    journal.write(200, {"train/loss": 0.5})
    journal.sync()
    journal.close()
    assert [record["step"] for record in read_journal(path)] == list(range(1, 201))
