"""Loss over FLOPs of runs that differ in their model, over all labels and by modality (MoMa, arXiv 2407.21770).

Runs that differ in their seed alone are one line. The ratio of a model to the dense one is the paper's: the dense
model's FLOPs over those with which the model reaches the dense model's last training loss. Where a model ends above the
dense one, the loss is the model's own last one, and the ratio below 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from data import page
from trainers import plots

Floats = npt.NDArray[np.float64]
ALL = "all"
SMOOTH = 60  # steps of the moving mean that ratios and crossings are read from, at most an eighth of a run
CLOSE = 3  # curves that cross more often are equal but for noise
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % points by number of seeds
# The paper's abstract, models of 1.4B, 1T tokens: ratios over all tokens, of text and of images.
PAPER: dict[str, tuple[float | None, float | None, float | None]] = {
    "dense": (1.0, 1.0, 1.0),
    "8 mixed": (3.0, 3.0, 2.8),
    "4 text 4 image": (3.7, 2.6, 5.2),
    "4 text 4 image, depth": (4.2, 3.4, 5.3),
}


@dataclass(frozen=True)
class Curves:
    """The runs of one model: losses [seeds, steps] by name (``all`` or a modality) over the same FLOPs."""

    name: str
    flops: Floats
    losses: dict[str, Floats]

    def mean(self, kind: str) -> Floats:
        """Smoothed, over the seeds."""
        return smooth(self.losses[kind]).mean(0)


def smooth(losses: Floats) -> Floats:
    """A trailing mean over the last steps [.., steps], over what there is of them at the beginning."""
    steps = losses.shape[-1]
    window = max(1, min(SMOOTH, steps // 8))
    sums = np.cumsum(np.concatenate([np.zeros_like(losses[..., :1]), losses], -1), -1)
    index = np.arange(1, steps + 1)
    first = np.maximum(index - window, 0)
    return (sums[..., index] - sums[..., first]) / (index - first)


def model_name(config: Mapping[str, Any]) -> str:
    """What tells the compared models apart: their experts and mixture of depths."""
    model = config.get("model", {})
    groups, kinds = model.get("experts", {}).get("groups", []), model.get("modalities", ["text"])
    name = "dense" if not groups else f"{groups[0]} mixed"
    if len(groups) > 1:
        name = " ".join(f"{count} {kind}" for count, kind in zip(groups, kinds, strict=True))
    if model.get("experts", {}).get("routing") == "token_choice" and groups:
        name += ", token choice"
    return name + (", depth" if model.get("depth", 1.0) < 1 else "")


def collect(runs: Sequence[tuple[Mapping[str, Any], Sequence[plots.Record]]]) -> list[Curves]:
    """Curves by model from (config, metrics) of every run, seeds in order, cut to the steps that all runs have.

    None, where runs have no FLOPs, no modalities or no dense model to compare with.
    """
    found: dict[str, list[tuple[Floats, dict[str, Floats]]]] = {}
    prefix = "train/loss_by_modality/"
    for config, records in sorted(runs, key=lambda run: run[0].get("seed", 0)):
        names = {ALL: "train/loss"}
        names |= {name.removeprefix(prefix): name for name in records[-1] if name.startswith(prefix)}
        flops = plots.series(records, "train/flops")[1]
        losses = {kind: plots.series(records, name)[1] for kind, name in names.items()}
        if len(losses) > 1 and len(flops) and all(len(values) == len(flops) for values in losses.values()):
            found.setdefault(model_name(config), []).append((flops, losses))
    if "dense" not in found or len(found) < 2:
        return []
    steps = min(len(flops) for seeds in found.values() for flops, _ in seeds)
    every = [losses for seeds in found.values() for _, losses in seeds]
    kinds = [kind for kind in every[0] if all(kind in losses for losses in every)]
    order = sorted(found, key=lambda name: (name != "dense", list(PAPER).index(name) if name in PAPER else len(PAPER)))
    return [
        Curves(
            name,
            found[name][0][0][:steps],
            {kind: np.stack([losses[kind][:steps] for _, losses in found[name]]) for kind in kinds},
        )
        for name in order
    ]


def ratio(dense: tuple[Floats, Floats], model: tuple[Floats, Floats]) -> float:
    """The ratio of FLOPs of one pair of smoothed curves (FLOPs, losses), both over the same range of FLOPs."""
    if model[1][-1] <= dense[1][-1]:
        return float(dense[0][-1] / first_at(*model, dense[1][-1]))
    return float(first_at(*dense, model[1][-1]) / model[0][-1])


def first_at(flops: Floats, losses: Floats, loss: float) -> float:
    """The FLOPs at which a curve is at ``loss`` or below for the first time, between two steps on a straight line."""
    place = int(np.argmax(losses <= loss))
    if place == 0:
        return float(flops[0])
    share = (losses[place - 1] - loss) / (losses[place - 1] - losses[place])
    return float(flops[place - 1] + share * (flops[place] - flops[place - 1]))


def ratios(dense: Curves, model: Curves, kind: str) -> Floats:
    """The ratio of each pair of seeds in order; what one of the two has more is left out."""
    pairs = zip(smooth(dense.losses[kind]), smooth(model.losses[kind]), strict=False)
    return np.array([ratio((dense.flops, d), (model.flops, m)) for d, m in pairs])


def interval(values: Floats) -> str:
    """Mean and 95 % confidence interval over seeds (Student's t)."""
    if len(values) < 2:
        return f"{values.mean():.2f}"
    t = STUDENT.get(len(values), 2.3)
    return f"{values.mean():.2f} +- {t * values.std(ddof=1) / math.sqrt(len(values)):.2f}"


def crossings(dense: Curves, model: Curves, kind: str) -> list[tuple[float, bool]]:
    """(FLOPs, whether the model is below from there on) wherever the mean curves cross, after the first eighth."""
    start = len(dense.flops) // 8
    theirs = np.interp(dense.flops, model.flops, model.mean(kind))
    below = (theirs < dense.mean(kind))[start:]
    places = np.flatnonzero(np.diff(below)) + 1
    return [(float(dense.flops[start + place]), bool(below[place])) for place in places]


def describe_crossings(dense: Curves, model: Curves, kind: str) -> str:
    """In words: where a model's mean curve is below the dense one."""
    found = crossings(dense, model, kind)
    below = bool(model.mean(kind)[-1] < np.interp(model.flops[-1], dense.flops, dense.mean(kind)))
    if not found:
        return "below throughout" if below else "above throughout"
    flops, now = found[-1]
    if len(found) > CLOSE:
        return f"crosses {len(found)} times, {'below' if now else 'above'} at the end"
    return f"{'below' if now else 'above'} from {flops:.3g} FLOPs on"


def picture(curves: Sequence[Curves], kind: str) -> Figure:
    """Mean training loss over FLOPs, and the spread of the seeds."""
    figure, axes = plots.new_axes(f"Training loss, {kind}", "nats per token")
    for index, one in enumerate(curves):
        seeds = smooth(one.losses[kind])
        start = len(one.flops) // 8  # without the fall that all share
        axes.plot(one.flops[start:], seeds.mean(0)[start:], color=f"C{index}", linewidth=1.5, label=one.name)
        if len(seeds) > 1:
            low, high = seeds.min(0)[start:], seeds.max(0)[start:]
            axes.fill_between(one.flops[start:], low, high, color=f"C{index}", alpha=0.15, linewidth=0)
    axes.set_xlabel("FLOPs", fontsize=9)
    axes.set_xscale("log")
    plots.legend(axes)
    return figure


def tables(curves: Sequence[Curves]) -> list[tuple[str, str]]:
    """Titles and HTML: last losses, ratios beside the paper's, and where the curves cross."""
    dense, kinds = curves[0], list(curves[0].losses)
    last = [
        (one.name, len(one.losses[ALL]), *(_spread(smooth(one.losses[kind])[:, -1]) for kind in kinds))
        for one in curves
    ]
    gains, places = [], []
    for one in curves[1:]:
        published = PAPER.get(one.name, ())
        gains.append(
            (
                one.name,
                *(interval(ratios(dense, one, kind)) for kind in kinds),
                *(f"{value:g}" if value else "" for value in published or [None] * 3),
            )
        )
        places.append((one.name, *(describe_crossings(dense, one, kind) for kind in kinds)))
    head = ("model", *kinds)
    measured = (f"{kind} (here)" for kind in kinds)
    paper = (f"{kind} (paper, 1.4B, 1T tokens)" for kind in (ALL, "text", "image"))
    title = f"Training loss after {dense.flops[-1]:.3g} FLOPs ({len(dense.flops):,} steps)"
    compared = "FLOPs of the dense model to the same loss, over the model's"
    return [
        (title, page.table(last, ("model", "seeds", *kinds))),
        (compared, page.table(gains, ("model", *measured, *paper))),
        ("Where the mean curves cross the dense model's", page.table(places, head)),
    ]


def _spread(values: Floats) -> str:
    """Mean and, over seeds, the standard deviation."""
    return f"{values.mean():.4f}" + (f" +- {values.std(ddof=1):.4f}" if len(values) > 1 else "")
