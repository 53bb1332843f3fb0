"""A run folder as pictures and one HTML page that needs nothing else. No torch, no network, no account."""

import base64
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from conf.errors import DataError
from data.files import write_atomic
from trainers import plots
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints, step_of
from trainers.console import duration, short_number
from trainers.journal import METRICS_FILE, SAMPLES_FILE, read_journal
from trainers.lineage import FILE_NAME as LINEAGE_FILE

FOLDER, PAGE = "report", "index.html"


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
    )


def write_report(run_dir: Path | str) -> Path:
    """Write ``report/*.png`` and ``report/index.html`` into a run folder, finished or not; returns the page.

    Raises:
        DataError: there is nothing to report on.
    """
    run = read_run(Path(run_dir))
    folder = run.path / FOLDER
    figures = {name: draw(run.metrics) for name, draw in plots.PICTURES.items()}
    figures["dropped"] = plots.dropped(run.stages.get("curated", {}).get("figures", {}))
    pictures = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    for name, content in pictures.items():
        write_atomic(folder / f"{name}.png", content)
    write_atomic(folder / PAGE, _page(run, pictures))
    return folder / PAGE


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """Label and value of the tiles on top of the page."""
    first, last = run.metrics[0], run.metrics[-1]
    total = run.config.get("trainer", {}).get("steps")
    held_out = [record["eval/loss"] for record in run.metrics if record.get("eval/loss") is not None]
    speed = sorted(plots.series(run.metrics, "throughput/tokens_per_sec")[1])
    seconds = float(plots.series(run.metrics, "time/step_sec")[1].sum())
    checkpoints = complete_checkpoints(checkpoints_folder(str(run.path)))
    facts = [
        ("status", str(run.status.get("state", "done" if last["step"] == total else "unfinished"))),
        ("step", f"{last['step']}" + (f" of {total}" if total else "")),
        ("loss", f"{_number(first.get('train/loss'))} to {_number(last.get('train/loss'))}"),
        ("held out", _number(held_out[-1] if held_out else None)),
        ("tokens", short_number(last.get("train/tokens") or 0)),
        ("median speed", f"{short_number(speed[len(speed) // 2])} tokens/s" if speed else "-"),
        ("time in steps", duration(seconds)),
        ("newest checkpoint", f"step {step_of(checkpoints[0])}" if checkpoints else "none"),
    ]
    return facts


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _row(row: Sequence[Any], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    top = f"<thead>{_row(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(_row(row, 'td') for row in rows)}</tbody></table>"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


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
    columns = ("stage", "fingerprint", "made", "figures")
    return [
        ("Samples", _table(samples, ("step", "prompt", "continuation")) if samples else ""),
        ("Data", _table(stages, columns) if stages else ""),
        ("Attempts", _table(attempts, ("attempt", "when", "event", "facts")) if attempts else ""),
        ("Config", f"<details><summary>all keys</summary>{_table(_flat(run.config))}</details>" if run.config else ""),
    ]


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
    title = html.escape(str(run.config.get("name", run.path.name)))
    tiles = "".join(
        f"<div class=tile><small>{html.escape(label)}</small><b>{html.escape(value)}</b></div>"
        for label, value in _facts(run)
    )
    images = "".join(
        f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in pictures.items()
    )
    tables = "".join(f"<h2>{name}</h2>{body}" for name, body in _sections(run) if body)
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1><p class=muted>{html.escape(str(run.path.absolute()))}, written {written}</p>
<div class=tiles>{tiles}</div><div class=pictures>{images}</div>{tables}
</body></html>
"""


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #2b2f36; background: #fff; margin: 2rem auto; padding: 0 1rem;
  max-width: 84rem; }
h1 { margin: 0; } h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; } .muted { color: #6b7280; margin: .2rem 0 1.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: 1rem; }
.tile { border: 1px solid #e3e6ea; border-radius: 8px; padding: .5rem .9rem; }
.tile small { display: block; color: #6b7280; } .tile b { font-size: 1.1rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem;
  align-items: start; }
.pictures img { width: 100%; border: 1px solid #e3e6ea; border-radius: 8px; }
table { border-collapse: collapse; font-size: .85rem; max-width: 100%; } th, td { text-align: left; vertical-align: top;
  padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e3e6ea; white-space: pre-wrap; overflow-wrap: anywhere; }
td:first-child, th:first-child { white-space: nowrap; }
th { color: #6b7280; font-weight: 600; } summary { cursor: pointer; }
"""
