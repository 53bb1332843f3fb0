"""Run ``sundog`` as a user does: a process of its own, its exit code and what it printed."""

import os
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from data.curate import curate
from data.order import order
from data.pack import pack
from data.stages import serial_units
from launch.preflight import load_config

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    """The environment of a command: this checkout first on the path, one thread, no network for hubs."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def sundog(*arguments: str, cwd: Path, timeout: float = 180.0) -> Done:
    """Run a command to its end; it is killed, and the test fails, when it takes longer than ``timeout`` seconds."""
    program = [sys.executable, "-m", "launch", *arguments]
    done = subprocess.run(
        program,
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def prepare_data(folder: Path, settings: list[str]) -> None:
    """Run the data stages in this process, without Ray: for tests that are about what comes after them."""
    with chdir(folder):
        config = load_config(settings)
        for stage in (curate, order, pack):
            stage(config, serial_units)


def write_corpus(folder: Path, documents: int = 120) -> Path:
    """Write a small corpus of distinct English text files about a few topics; return its folder."""
    topics = {
        "tides": "The moon pulls the ocean and the water rises along the coast twice a day.",
        "bread": "Flour, water, salt and yeast become dough, and the oven turns dough into bread.",
        "chess": "A knight moves in the shape of the letter L and may jump over other pieces.",
        "roads": "Engineers grade the slope of a road so that rain runs off into the ditch.",
    }
    folder.mkdir(parents=True)
    for index in range(documents):
        name = list(topics)[index % len(topics)]
        lines = [f"{topics[name]} This is remark {index * 31 + line} on {name}." for line in range(6)]
        (folder / f"{index:04d}-{name}.txt").write_text("\n".join(lines))
    return folder
