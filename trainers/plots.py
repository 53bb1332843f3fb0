"""Pictures of a run from its records: each function returns a finished matplotlib figure. No torch, no display."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

Record = Mapping[str, Any]
Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # steps, values

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9680f", "#2c8a57", "#8a8f98"
_INK, _GRID = "#2b2f36", "#e3e6ea"
SMOOTH_STEPS = 21  # drawn only where there are clearly more


def series(records: Sequence[Record], name: str) -> Series:
    """Return the steps and values of a metric, where it was recorded."""
    found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    steps, values = (zip(*found, strict=True)) if found else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def smooth(values: npt.NDArray[np.float64], window: int = SMOOTH_STEPS) -> npt.NDArray[np.float64]:
    """Return the centred moving mean, over a smaller (still centred) window at the ends: it neither lags nor bends."""
    index = np.arange(values.size)
    radius = np.minimum(np.minimum(index, index[::-1]), window // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + radius + 1] - sums[index - radius]) / (2 * radius + 1)


def new_axes(title: str, unit: str, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.set_ylabel(unit, fontsize=9, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def draw_line(axes: Axes, data: Series, color: str, label: str, width: float = 1.6, alpha: float = 1.0) -> None:
    """A line, or a dot where there is one point only."""
    marker = "o" if data[0].size < 3 else None
    axes.plot(*data, color=color, linewidth=width, alpha=alpha, label=label, marker=marker, markersize=4)


def step_axis(axes: Axes, last: float) -> None:
    axes.set_xlabel("optimizer step", fontsize=9, color=_INK)
    axes.set_xlim(0, 1.03 * last if last > 1 else 2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def legend(axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)


def legend_below(figure: Figure) -> None:
    """For names too many or too long to stand on the curves."""
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7, labelcolor=_INK)


def thousands(axes: Axes, largest: float) -> None:
    """Write large numbers as 12k."""
    if largest >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def loss(records: Sequence[Record]) -> Figure | None:
    """Training loss, its moving average, and the held-out loss."""
    train, held_out = series(records, "train/loss"), series(records, "eval/loss")
    if not train[0].size:
        return None
    pixels = any("image/codes_used" in record for record in records)
    figure, axes = new_axes("Loss", "squared pixel error" if pixels else "nats per token")
    if train[0].size > 2 * SMOOTH_STEPS:
        draw_line(axes, train, BLUE, "training", width=0.8, alpha=0.35)
        draw_line(axes, (train[0], smooth(train[1])), BLUE, f"training, mean over {SMOOTH_STEPS} steps")
    else:
        draw_line(axes, train, BLUE, "training")
    if held_out[0].size:
        axes.plot(*held_out, color=ORANGE, linewidth=1.2, marker="o", markersize=4, label="held out")
    step_axis(axes, train[0].max())
    legend(axes)
    return figure


def loss_by_position(records: Sequence[Record]) -> Figure | None:
    """Held-out loss against the context that a token has: of the first evaluation and of the last."""
    prefix = "eval/loss_by_position/"
    evaluated = [record for record in records if any(name.startswith(prefix) for name in record)]
    if not evaluated:
        return None
    figure, axes = new_axes("Held-out loss by position", "nats per token")
    chosen = [(evaluated[-1], BLUE)] if len(evaluated) == 1 else [(evaluated[0], GREY), (evaluated[-1], BLUE)]
    names: list[str] = []
    for record, color in chosen:
        buckets = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
        names = sorted(buckets, key=lambda bucket: int(bucket.split("-")[0]))
        values = [np.nan if buckets[name] is None else buckets[name] for name in names]
        axes.plot(range(len(names)), values, color=color, marker="o", markersize=5, label=f"step {record['step']}")
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 8 else 0)
    axes.set_xlabel("tokens of context before the label", fontsize=9, color=_INK)
    legend(axes)
    return figure


def _single(records: Sequence[Record], name: str, title: str, unit: str, color: str, zero: bool) -> Figure | None:
    data = series(records, name)
    if not data[0].size:
        return None
    figure, axes = new_axes(title, unit, height=2.6)
    if zero and data[0].size > 2 * SMOOTH_STEPS:
        draw_line(axes, data, color, title, width=0.7, alpha=0.35)
        draw_line(axes, (data[0], smooth(data[1])), color, "mean")
    else:
        draw_line(axes, data, color, title)
    if zero:
        axes.set_ylim(0, 1.1 * data[1].max() or 1.0)
    thousands(axes, data[1].max())
    step_axis(axes, data[0].max())
    return figure


def throughput(records: Sequence[Record]) -> Figure | None:
    """Tokens per second."""
    return _single(records, "throughput/tokens_per_sec", "Throughput", "tokens per second", GREEN, zero=True)


def memory(records: Sequence[Record]) -> Figure | None:
    """Peak memory of the fullest rank."""
    return _single(records, "memory/peak_gb", "Peak memory of a rank", "GB", BLUE, zero=True)


def learning_rate(records: Sequence[Record]) -> Figure | None:
    """The schedule as it was run."""
    return _single(records, "optim/lr", "Learning rate", "", GREY, zero=False)


def grad_norm(records: Sequence[Record]) -> Figure | None:
    """Gradient norm before clipping."""
    return _single(records, "optim/grad_norm", "Gradient norm before clipping", "", ORANGE, zero=True)


def dropped(figures: Mapping[str, Any]) -> Figure | None:
    """Documents by what became of them, from the curated manifest's figures."""
    counts = {"kept": int(figures.get("kept", 0)), **{k: int(v) for k, v in figures.get("dropped", {}).items()}}
    counts = dict(sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1])))
    if sum(counts.values()) == 0:
        return None
    figure, axes = new_axes("What became of the documents", "", height=1.2 + 0.3 * len(counts))
    axes.grid(visible=False)
    places = range(len(counts))
    axes.barh(places, list(counts.values()), color=[GREEN if name == "kept" else GREY for name in counts], height=0.7)
    axes.set_yticks(places, list(counts))
    axes.invert_yaxis()
    for place, count in zip(places, counts.values(), strict=True):
        axes.text(count, place, f" {count:,}", va="center", fontsize=8, color=_INK)
    axes.set_xlabel("documents", fontsize=9, color=_INK)
    axes.margins(x=0.12)
    return figure


def expert_load(records: Sequence[Record]) -> Figure | None:
    """How evenly experts are used, and the share of tokens that none of them took, by modality."""
    panels = {"moe/load_imbalance/": "Busiest expert over the mean", "moe/tokens_with_0/": "Tokens that no expert took"}
    names = {prefix: sorted({k for r in records for k in r if k.startswith(prefix)}) for prefix in panels}
    if not names["moe/load_imbalance/"]:
        return None
    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained", facecolor="white")
    for axes, (prefix, title) in zip(figure.subplots(len(panels), 1), panels.items(), strict=True):
        for index, name in enumerate(names[prefix]):
            draw_line(axes, series(records, name), f"C{index % 10}", name.removeprefix(prefix))
        axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_ylim(0, None)
        step_axis(axes, records[-1]["step"])
        legend(axes)
    return figure


ACTIVITIES = {"compute": (BLUE, 0.5), "wait": (ORANGE, 0.5), "send": (GREY, 0.12), "receive": (GREEN, 0.12)}


def timeline(record: Mapping[str, Any]) -> Figure | None:
    """What every rank of one sequence did during one attention call, forward and backward (trainers.timeline)."""
    ranks = record.get("ranks") or []
    directions = [name for name in ("forward", "backward") if any(rank.get(name) for rank in ranks)]
    if not directions:
        return None
    figure = Figure(figsize=(6.4, 0.9 + len(directions) * (0.5 + 0.34 * len(ranks))), dpi=120, layout="constrained")
    for axes, direction in zip(figure.subplots(len(directions), 1, squeeze=False)[:, 0], directions, strict=True):
        for row, rank in enumerate(ranks):
            for activity, start, end in rank.get(direction, []):
                color, height = ACTIVITIES[activity]
                offset = {"send": 0.32, "receive": 0.45}.get(activity, 0.0)
                axes.barh(row + offset, end - start, left=start, height=height, color=color, linewidth=0)
        axes.set_yticks(range(len(ranks)), [f"rank {row}" for row in range(len(ranks))])
        axes.invert_yaxis()
        axes.set_xlim(0, None)
        axes.set_title(f"Attention, {direction}", loc="left", fontsize=11, color=_INK, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.set_xlabel(f"ms since the call began, step {record.get('step', '')}", fontsize=8, color=_INK)
    handles = [Patch(color=color, label=name) for name, (color, _) in ACTIVITIES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


# File name to picture, in the order of the page.
PICTURES: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "loss": loss,
    "loss_by_position": loss_by_position,
    "throughput": throughput,
    "memory": memory,
    "learning_rate": learning_rate,
    "grad_norm": grad_norm,
    "expert_load": expert_load,
}
