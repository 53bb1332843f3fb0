"""Several runs side by side: their curves in one picture, their results and what differs between them in one table."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data import page
from data.files import write_atomic
from trainers import efficiency, plots
from trainers.console import short_number
from trainers.report import FOLDER, PAGE, RunFolder, number, read_run

CURVES = {"eval/loss": "Held-out loss", "train/loss": "Training loss", "throughput/tokens_per_sec": "Tokens per second"}
# Differ without meaning: who the run is, what other commands do, how often it is looked at.
IDENTITY = (
    *("name", "run_dir", "tracker.", "export.", "serve.", "generate.", "evaluate.", "sweep."),
    *("trainer.log_every", "trainer.eval_every", "trainer.checkpoint_every", "trainer.keep_checkpoints"),
    *("trainer.collective_timeout_sec", "sequence.trace_every", "sequence.timeout", "cluster.address"),
    *("cluster.start_timeout_sec", "cluster.hang_timeout_sec", "cluster.max_restarts", "cluster.object_store_mb"),
)
LEGEND_RUNS, LEGEND_INSIDE = 10, 3  # runs with a legend at all, and inside the picture
SWEEP_FILE = "sweep.json"  # of `sundog sweep`
WIDE = 10  # from the smallest value to the largest: drawn on a logarithmic axis


def curves(runs: Sequence[RunFolder], metric: str, title: str) -> Figure | None:
    """One metric of all runs over steps, smoothed where there are many."""
    found = [(run.path.name, plots.series(run.metrics, metric)) for run in runs]
    found = [(name, data) for name, data in found if data[0].size]
    if not found:
        return None
    figure, axes = plots.new_axes(title, metric)
    for index, (name, (steps, values)) in enumerate(found):
        smoothed = plots.smooth(values) if steps.size > 2 * plots.SMOOTH_STEPS else values
        plots.draw_line(axes, (steps, smoothed), f"C{index % 10}", name)
    plots.step_axis(axes, max(data[0].max() for _, data in found))
    plots.thousands(axes, max(data[1].max() for _, data in found))
    if LEGEND_INSIDE < len(found) <= LEGEND_RUNS:
        plots.legend_below(figure)
    elif len(found) <= LEGEND_RUNS:
        plots.legend(axes)
    return figure


def results(rows: Sequence[tuple[float, float]], key: str) -> Figure | None:
    """The held-out loss that each run ended with, over a number in which they differ; the best one is marked."""
    if len({value for value, _ in rows}) < 2:
        return None
    figure, axes = plots.new_axes(f"Held-out loss by {key}", "eval/loss")
    values, losses = [value for value, _ in rows], [loss for _, loss in rows]
    axes.plot(values, losses, "o", color="C0", markersize=5, label="a run")
    best = min(rows, key=lambda row: row[1])
    axes.plot(*best, "o", color="C3", markersize=7, label=f"best: {best[0]:g}")
    if min(values) > 0 and max(values) >= WIDE * min(values):
        axes.set_xscale("log")
    elif all(value.is_integer() for value in values):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel(key, fontsize=9)
    plots.legend(axes)
    return figure


def _by_key(runs: Sequence[RunFolder], last: Sequence[float | None], keys: Sequence[str]) -> dict[str, Figure | None]:
    """A picture for every key whose values are numbers; none where so many differ that no run tells them apart."""
    figures: dict[str, Figure | None] = {}
    configs = [dict(page.flat(run.config)) for run in runs]
    numbers = [key for key in keys if key != "seed" and all(_is_number(config.get(key)) for config in configs)]
    for key in numbers if len(numbers) < len(runs) else ():
        pairs = zip(configs, last, strict=True)
        figures[f"by {key}"] = results([(float(config[key]), loss) for config, loss in pairs if loss is not None], key)
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _not_done(folder: Path) -> str:
    """The jobs of a sweep that did not come to their end, and why, as a table."""
    try:
        jobs = json.loads((folder / SWEEP_FILE).read_text())["jobs"]
    except (OSError, ValueError, KeyError):
        return ""
    rows = [(job["label"], job["state"], f"{job['step']}/{job['steps']}", job["message"]) for job in jobs]
    rows = [row for row in rows if row[1] != "done"]
    return page.table(rows, ("job", "state", "step", "why")) if rows else ""


def differing(runs: Sequence[RunFolder]) -> list[str]:
    """The config keys in which the runs differ."""
    configs = [dict(page.flat(run.config)) for run in runs]
    keys = sorted({key for config in configs for key in config})
    return [k for k in keys if not k.startswith(IDENTITY) and len({str(config.get(k)) for config in configs}) > 1]


def write_comparison(run_dirs: Sequence[Path], folder: Path) -> Path:
    """Write ``report/index.html`` and its pictures below ``folder``; returns the page.

    Raises:
        DataError: one of the folders holds no run.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    keys, last = differing(runs), [_last(run, "eval/loss") for run in runs]
    rows = []
    for index in sorted(range(len(runs)), key=lambda i: (last[i] is None, last[i] or 0.0)):
        run = runs[index]
        config, final = dict(page.flat(run.config)), run.metrics[-1]
        state = str(run.status.get("state", ""))
        results = (number(last[index]), number(final.get("train/loss")), short_number(final.get("train/tokens") or 0))
        rows.append((run.path.name, state, final["step"], *results, *(_short(config.get(key, "")) for key in keys)))
    head = ("run", "state", "step", "held-out loss", "training loss", "tokens", *keys)
    figures = {name: curves(runs, name, title) for name, title in CURVES.items()}
    alike = all(key == "seed" or key.startswith("model.") for key in keys)  # else other settings pass for seeds
    compared = efficiency.collect([(run.config, run.metrics) for run in runs]) if alike else []
    kinds = compared[0].losses if compared else ()
    pictures = {f"loss_over_flops_{kind}": page.png(efficiency.picture(compared, kind)) for kind in kinds}
    figures |= _by_key(runs, last, keys)
    pictures |= {name.replace("/", "_"): page.png(figure) for name, figure in figures.items() if figure is not None}
    for name, content in pictures.items():
        write_atomic(folder / FOLDER / f"{name}.png", content)
    subtitle = f"{len(runs)} runs, best held-out loss first; written {time.strftime('%Y-%m-%d %H:%M:%S')}"
    told = page.sections(efficiency.tables(compared)) if compared else ""
    tables = page.sections([("Runs", page.table(rows, head)), ("Not done", _not_done(folder))])
    body = told + tables + page.pictures(pictures)
    write_atomic(folder / FOLDER / PAGE, page.page(folder.name, subtitle, body))
    return folder / FOLDER / PAGE


def _short(value: object) -> object:
    """A searched number in as many digits as a person compares."""
    return f"{value:.4g}" if isinstance(value, float) else value


def _last(run: RunFolder, metric: str) -> float | None:
    found = plots.series(run.metrics, metric)[1]
    return float(found[-1]) if found.size else None
