"""README describes what is there: commands parse, shown outputs are what commands print, its table is complete."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conf.schema import GROUPS, OVERLAYS
from launch.__main__ import COMMANDS
from launch.multirun import load_sweep
from launch.preflight import load_config, options
from tests.helpers.readme import BLOCKS, README, ROOT, commands


def test_readme_is_short_and_its_links_exist() -> None:
    assert len(README.splitlines()) < 150
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_of_the_readme_exists_and_its_overrides_compose() -> None:
    shown = commands()
    assert {words[1] for words in shown} >= {
        "curate",
        "order",
        "pack",
        "train",
        "export",
        "serve",
        "generate",
        "submit",
        "sweep",
    }
    for words in shown:
        rest = [word for word in words[2:] if "=" in word and "learnin_rate" not in word]
        assert words[1] in COMMANDS
        if words[1] == "sweep":
            load_sweep(rest)
        else:
            load_config(rest)


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_shown_output_is_what_the_command_prints(tmp_path: Path) -> None:
    checked, environment = 0, {**os.environ, "PYTHONPATH": str(ROOT)}
    for block in BLOCKS:
        first, _, shown = block.partition("\n")
        if not first.startswith("$ sundog"):
            continue
        words = shlex.split(first)[2:]
        program = [sys.executable, "-m", "launch", *words]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.stdout + done.stderr).strip() == shown.strip()
        checked += 1
    assert checked == 2


def test_group_table_is_complete() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.M))
    assert set(rows) == {*GROUPS, *OVERLAYS}
    for group, text in rows.items():
        assert set(re.findall(r"`([\w]+)`", text)) == set(options(group))
