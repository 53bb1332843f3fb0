"""Killed at any moment and run again: the bytes are those of an undisturbed run."""

import argparse
import multiprocessing
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.errors import SundogError
from data.curate import curate
from data.manifest import read_manifest
from data.order import order
from data.pack import pack
from data.stages import serial_units, stage_folders
from tests.helpers.stage_files import stage_files
from tests.unit.data.samples import make_config, write_jsonl

DIED = 9
PROCESSES = multiprocessing.get_context("forkserver")  # children that start at once, as all is imported already
PROCESSES.set_forkserver_preload([__name__])


def all_stages(root: Path, corpus: Path, stop_at: int, overwrite: bool, counter: Any) -> None:
    """Runs the stages and dies without notice at the given sync or rename; leaves their number in ``counter``."""

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            if call is replace and not Path(args[1]).is_relative_to(root):
                return call(*args, **settings)  # numba keeps compiled code: only where nothing is kept yet
            counter.value += 1
            if counter.value == stop_at:
                os._exit(DIED)
            return call(*args, **settings)

        return run

    replace = os.replace
    os.fsync, os.replace = counting(os.fsync), counting(replace)
    config = make_config(root, corpus, overwrite=overwrite)
    config.curation.min_chars = 210 if overwrite else 200
    for stage in (curate, order, pack):
        stage(config, serial_units)


def run(
    root: Path, corpus: Path, *, stop_at: int = 0, kill_after: float | None = None, overwrite: bool = False
) -> tuple[int | None, int]:
    """Exit code and file operations of a process that runs all stages, and may be killed after some seconds."""
    counter = PROCESSES.Value("i", 0)
    process = PROCESSES.Process(target=all_stages, args=(root, corpus, stop_at, overwrite, counter))
    process.start()
    process.join(timeout=kill_after or 120)
    process.kill()
    process.join(timeout=60)
    return process.exitcode, counter.value


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", 20)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[dict[str, bytes], int]:
    """What an undisturbed run leaves, and how many syncs and renames it makes."""
    root = tmp_path_factory.mktemp("undisturbed")
    code, count = run(root, corpus)
    assert code == 0
    return stage_files(root / "data"), count


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.4, 0.55, 0.7, 0.85, 0.93, 0.99, 1.0])
def test_death_at_a_file_operation(
    tmp_path: Path, corpus: Path, undisturbed: tuple[dict[str, bytes], int], share: float
) -> None:
    expected, count = undisturbed
    stop_at = max(1, round(share * count))
    assert run(tmp_path, corpus, stop_at=stop_at) == (DIED, stop_at)
    code, again = run(tmp_path, corpus)
    assert code == 0
    assert again < count or share < 0.1  # finished units are not done again
    assert stage_files(tmp_path / "data") == expected


def test_kills_at_random_moments(tmp_path: Path, corpus: Path, undisturbed: tuple[dict[str, bytes], int]) -> None:
    chance = random.Random(7)
    for _ in range(4):
        code, _ = run(tmp_path, corpus, kill_after=chance.uniform(0.05, 0.8))
        assert code in (0, -9)
    assert run(tmp_path, corpus)[0] == 0
    assert stage_files(tmp_path / "data") == undisturbed[0]


@pytest.mark.parametrize("stop_at", [3, 30, 90])
def test_death_while_old_output_is_replaced(tmp_path: Path, corpus: Path, stop_at: int) -> None:
    assert run(tmp_path / "one", corpus, overwrite=True)[0] == 0
    assert run(tmp_path / "two", corpus)[0] == 0
    assert run(tmp_path / "two", corpus, stop_at=stop_at, overwrite=True)[0] == DIED
    assert run(tmp_path / "two", corpus, overwrite=True)[0] == 0
    assert stage_files(tmp_path / "two" / "data") == stage_files(tmp_path / "one" / "data")
    folders = stage_folders(make_config(tmp_path / "two", corpus))
    assert read_manifest(folders.packed).lineage[2]["config"]["min_chars"] == 210


def stages_with_little_room(root: Path, corpus: Path, limit: int, reply: Any) -> None:
    """Runs the stages where no file may grow beyond ``limit`` bytes; replies with the error's type and text."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        all_stages(root, corpus, 0, False, argparse.Namespace(value=0))
    except SundogError as error:
        reply.put((type(error).__name__, str(error)))
    reply.close()


@pytest.mark.parametrize("limit", [300, 4500, 8500, 9000])
def test_no_room_in_the_middle_of_a_file(
    tmp_path: Path, corpus: Path, undisturbed: tuple[dict[str, bytes], int], limit: int
) -> None:
    reply = PROCESSES.Queue()
    process = PROCESSES.Process(target=stages_with_little_room, args=(tmp_path, corpus, limit, reply))
    process.start()
    kind, text = reply.get(timeout=120)
    process.join(timeout=60)
    assert kind == "ResourceError"
    assert str(tmp_path / "data") in text
    assert list((tmp_path / "data").rglob("*.tmp")) == []
    assert all(path.stat().st_size <= limit for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert run(tmp_path, corpus)[0] == 0
    assert stage_files(tmp_path / "data") == undisturbed[0]
