"""``sundog score`` and ``sundog scorer``: PreSelect's stages on Ray Data, a table of figures, and the report."""

from typing import Any

from conf.errors import EXIT_DONE
from conf.schema import RunConfig
from data.manifest import Manifest
from data.preselect.report import write_report
from data.preselect.score import folder_of
from launch.progress import format_seconds
from launch.stages import run_stage


def describe_models(figures: dict[str, Any]) -> str:
    """One line a model, weakest first."""
    models = sorted(figures["models"], key=lambda model: model["ability"])
    width = max(len(model["name"]) for model in models)
    lines = [f"  {'model':<{width}}  ability  bits/char  parameters"]
    for model in models:
        loss = "-" if model["mean_loss"] is None else f"{model['mean_loss']:.3f}"
        lines.append(f"  {model['name']:<{width}}  {model['ability']:7.4g}  {loss:>9}  {model['parameters']:>10,}")
    lines += [f"  left out: {reason.splitlines()[0]}" for reason in figures["failed"].values()]
    return "\n".join(lines)


def describe(name: str, manifest: Manifest) -> str:
    """The figures of a finished stage as lines."""
    figures = manifest.figures
    if name == "scorer":
        labels = f"{figures['positives']:,} positives, {figures['negatives']:,} negatives"
        return f"{labels}, AUC on {figures['held_out']:,} held-out documents {figures['auc']:.4f}"
    half = figures["reliability"]["split_half"]
    line = f"{figures['documents']:,} documents, {figures['positives']:,} positives and as many negatives, "
    line += f"split-half reliability {'-' if half is None else f'{half:.2f}'}"
    if figures["no_strength"]:
        line += f", {figures['no_strength']:,} without a finite loss left out"
    return f"{line}\n{describe_models(figures)}"


def main(name: str, config: RunConfig) -> int:
    manifest, seconds = run_stage(name, config)
    if manifest.reused:
        print(f"{name}: nothing to do, complete since {manifest.created} (fingerprint {manifest.fingerprint[:12]})")
    print(f"{name}: {describe(name, manifest)}  [{format_seconds(seconds)}]")
    print(f"report: {write_report(config)}")
    if name == "scorer":
        print(f"select: curation.preselect.enabled=true curation.preselect.scorer={folder_of(config, 'scorer')}")
    return EXIT_DONE
