"""A run folder as pictures and one HTML page that needs nothing else. No torch, no network, no account."""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conf.errors import DataError
from data import page
from data.files import write_atomic
from trainers import plots
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints, step_of
from trainers.console import duration, short_number
from trainers.journal import METRICS_FILE, SAMPLES_FILE, read_journal
from trainers.lineage import FILE_NAME as LINEAGE_FILE
from trainers.metrics import find

FOLDER, PAGE = "report", "index.html"
RECONSTRUCTIONS = "reconstructions.png"  # of an image tokenizer's run: held-out images, each before what becomes of it
EVALUATION_FILE = "evaluation.json"  # of `sundog evaluate`
TIMELINE_FILE = "timeline.json"  # trainers.timeline writes it; that module needs torch, this one does not


@dataclass
class RunFolder:
    """What a run left behind so far; every part but the folder itself may be missing."""

    path: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    status: dict[str, Any]
    attempts: list[Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def _read(path: Path, otherwise: Any) -> Any:
    """A JSON or YAML file, or ``otherwise`` where it is missing, half written or of another kind."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return otherwise
    return value if isinstance(value, type(otherwise)) else otherwise


def _read_lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read_run(run_dir: Path) -> RunFolder:
    """Read a run folder as far as it is there.

    Raises:
        DataError: the folder is missing or holds no metrics at all.
    """
    metrics = read_journal(run_dir / METRICS_FILE)
    if not metrics:
        raise DataError(
            "run_dir", run_dir, f"a run folder has a {METRICS_FILE} with at least one step", "run `sundog train` first"
        )
    return RunFolder(
        path=run_dir,
        metrics=metrics,
        samples=read_journal(run_dir / SAMPLES_FILE),
        config=_read(run_dir / "config.yaml", {}),
        status=_read(run_dir / "status.json", {}),
        attempts=_read_lines(run_dir / "attempts.jsonl"),
        stages=_read(run_dir / LINEAGE_FILE, {}),
        evaluation=_read(run_dir / EVALUATION_FILE, {}).get("results", {}),
    )


def write_report(run_dir: Path | str) -> Path:
    """Write ``report/*.png`` and ``report/index.html`` into a run folder, finished or not; returns the page.

    Raises:
        DataError: there is nothing to report on.
    """
    run = read_run(Path(run_dir))
    folder = run.path / FOLDER
    figures = {name: draw(run.metrics) for name, draw in plots.PICTURES.items()}
    figures["timeline"] = plots.timeline(_read(run.path / TIMELINE_FILE, {}))
    figures["dropped"] = plots.dropped(run.stages.get("curated", {}).get("figures", {}))
    pictures = {name: page.png(figure) for name, figure in figures.items() if figure is not None}
    if (run.path / RECONSTRUCTIONS).is_file():
        pictures = {"reconstructions": (run.path / RECONSTRUCTIONS).read_bytes(), **pictures}
    for name, content in pictures.items():
        write_atomic(folder / f"{name}.png", content)
    write_atomic(folder / PAGE, _page(run, pictures))
    return folder / PAGE


def _state(status: Mapping[str, Any]) -> str:
    """What status.json says; of a run whose command is gone without a word (on this host), that it was killed."""
    state, pid = str(status.get("state", "")), status.get("pid")
    if state == "running" and status.get("host") == socket.gethostname() and isinstance(pid, int):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "killed: the same command goes on"
        except PermissionError:
            return state
    return state


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """Label and value of the tiles on top of the page."""
    first, last = run.metrics[0], run.metrics[-1]
    total = run.config.get("trainer", {}).get("steps")
    held_out = [record["eval/loss"] for record in run.metrics if record.get("eval/loss") is not None]
    speed = sorted(plots.series(run.metrics, "throughput/tokens_per_sec")[1])
    seconds = float(plots.series(run.metrics, "time/step_sec")[1].sum())
    checkpoints = complete_checkpoints(checkpoints_folder(str(run.path)))
    facts = [
        ("status", _state(run.status) or ("done" if last["step"] == total else "unfinished")),
        ("step", f"{last['step']}" + (f" of {total}" if total else "")),
        ("loss", f"{number(first.get('train/loss'))} to {number(last.get('train/loss'))}"),
        ("held out", number(held_out[-1] if held_out else None)),
        ("tokens", short_number(last.get("train/tokens") or 0)),
        ("median speed", f"{short_number(speed[len(speed) // 2])} tokens/s" if speed else "-"),
        ("time in steps", duration(seconds)),
        ("newest checkpoint", f"step {step_of(checkpoints[0])}" if checkpoints else "none"),
    ]
    return facts


def number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _sections(run: RunFolder) -> list[tuple[str, str]]:
    """Title and HTML of the tables below the pictures; empty ones are left out by the caller."""
    samples = [
        (record["step"], _escaped(row.get("prompt", "")), _escaped(row.get("continuation", "")))
        for record in run.samples[:1] + run.samples[1:][-1:]
        for row in record.get("rows", [])
    ]
    stages = [
        (name, stage.get("fingerprint", "")[:16], stage.get("created", ""), _short(stage.get("figures", {})))
        for name, stage in run.stages.items()
    ]
    attempts = [_attempt(record) for record in run.attempts if isinstance(record, dict)]
    judged = [
        (policy, task, figure, f"{value:.3f}")
        for policy, tasks in run.evaluation.items()
        for task, found in tasks.items()
        for figure, value in found.items()
    ]
    experts = _experts(run.metrics)
    columns = ("stage", "fingerprint", "made", "figures")
    return [
        ("Samples", page.table(samples, ("step", "prompt", "continuation")) if samples else ""),
        ("Data", page.table(stages, columns) if stages else ""),
        ("Evaluation", page.table(judged, ("attention", "task", "figure", "value")) if judged else ""),
        ("Experts", page.table(experts, ("metric", "first", "last", "meaning")) if experts else ""),
        ("Attempts", page.table(attempts, ("attempt", "when", "event", "facts")) if attempts else ""),
        (
            "Config",
            f"<details><summary>all keys</summary>{page.table(page.flat(run.config))}</details>" if run.config else "",
        ),
    ]


def _experts(records: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """What is known of routers, experts and what they cost: the first and the last value of each metric."""
    found = []
    for name in sorted({name for record in records for name in record if name.startswith("moe/")}):
        _, values = plots.series(records, name)
        try:
            metric = find(name)
        except KeyError:  # a run of another version
            continue
        if values.size:
            found.append((name, number(values[0]), f"{number(values[-1])} {metric.unit}".strip(), metric.description))
    return found


def _escaped(text: str) -> str:
    """A text on one line, its line ends visible."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _attempt(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    facts = {key: value for key, value in record.items() if key not in ("attempt", "time", "event")}
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.get("time", 0)))
    return str(record.get("attempt", "")), when, str(record.get("event", "")), _short(facts)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items() if not isinstance(item, list))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _page(run: RunFolder, pictures: Mapping[str, bytes]) -> str:
    subtitle = f"{run.path.absolute()}, written {time.strftime('%Y-%m-%d %H:%M:%S')}"
    body = page.tiles(_facts(run)) + page.pictures(pictures) + page.sections(_sections(run))
    return page.page(str(run.config.get("name", run.path.name)), subtitle, body)
