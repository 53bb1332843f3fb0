"""``sundog rephrase`` as a command, against a server that speaks the protocol of a larger model, killed on its way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from data.manifest import read_manifest
from data.rephrase.store import Store
from tests.helpers.chat_server import Served, chat_server
from tests.helpers.cli import environment
from tests.helpers.rephrases import good_answer, rephrase_settings

SLOTS = 4
# The command as it is, but for its units of work: they run in its own process and not on Ray, which starts slowly.
PROGRAM = """
import sys
import launch.rephrase
from data.stages import serial_units
from launch.__main__ import main
launch.rephrase.on_cluster = lambda config, logs, stage, show: stage(serial_units)
sys.exit(main(["rephrase", *sys.argv[1:]]))
"""


def start(folder: Path, settings: list[str], served: Served) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, *settings, f"rephrase.endpoint={served.url}"]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(run: "subprocess.Popen[str]") -> str:
    """What a run printed until it was done."""
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 0, output
    return output


def kill(run: "subprocess.Popen[str]", served: Served, answers: int, number: int) -> None:
    """Sends a signal once the server has sent so many answers."""
    deadline = time.monotonic() + 240
    while served.answered.total() < answers and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode in (-number, 128 + number), output


def stored(folder: Path, served: Served) -> set[str]:
    """The requests whose answers are kept."""
    with Store(folder / "data" / "rephrase" / "store") as store:
        return set(store.get(served.attempts))


def contents(stage: Path) -> list[str]:
    """The digests of a stage's files; their names also tell how long answers took."""
    return sorted(entry["sha256"] for entry in read_manifest(stage).files.values())


def test_a_killed_command_goes_on_and_repeats_nothing_that_was_answered(tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM: what was in flight may be sent again; a request whose answer is kept never is."""
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    disturbed.mkdir()
    calm.mkdir()
    common = rephrase_settings(tmp_path)
    settings = [*common, f"data.dir={disturbed}/data", f"run_dir={disturbed}/run"]
    with chat_server(lambda attempt, body: "later", good_answer) as served:
        kept: list[set[str]] = []
        sent: list[dict[str, int]] = []
        for number, answers in ((signal.SIGKILL, 8), (signal.SIGTERM, 20)):
            kill(start(disturbed, settings, served), served, answers, number)
            kept.append(stored(disturbed, served))
            sent.append(dict(served.attempts))
        assert "report" in finish(start(disturbed, settings, served))
    assert len(kept[0]) >= 4
    assert kept[0] < kept[1] < set(served.attempts)
    for names, attempts in zip(kept, sent, strict=True):
        assert all(served.attempts[name] == attempts[name] for name in names)
        assert len(set(attempts) - names) <= SLOTS  # in flight
    assert sum(count - 1 for count in served.attempts.values()) <= 2 * SLOTS
    with chat_server(answer=good_answer) as undisturbed:
        finish(start(calm, [*common, f"data.dir={calm}/data", f"run_dir={calm}/run"], undisturbed))
    assert set(undisturbed.attempts) == set(served.attempts)
    for stage in ("rephrase/judged", "mixed/curated", "mixed/packed-random-64"):
        ours, theirs = (contents(folder / "data" / stage) for folder in (disturbed, calm))
        assert ours == theirs
