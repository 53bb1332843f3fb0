"""``sundog curate``, ``order`` and ``pack``: one data stage each, run on Ray Data; ``sundog prepare``: all three."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cluster.connection import connect
from cluster.pipeline import run_units
from conf.schema import RunConfig
from data.curate import curate
from data.curation_report import write_report
from data.manifest import Manifest
from data.order import order
from data.order_report import MOST_DOCUMENTS
from data.order_report import write_report as write_order_report
from data.pack import pack
from data.preselect.score import score
from data.preselect.scorer import scorer
from launch.progress import format_seconds, progress

STAGES: dict[str, Callable[..., Manifest]] = {
    "curate": curate,
    "order": order,
    "pack": pack,
    "score": score,
    "scorer": scorer,
}


CHAIN = ("curate", "order", "pack")


def run_stage(name: str, config: RunConfig) -> tuple[Manifest, float]:
    """Run one stage on the connected (or a local) Ray cluster; return its manifest and the seconds it took."""
    start = time.monotonic()
    manifest = on_cluster(config, Path(config.data.dir) / "logs", partial(STAGES[name], config))
    return manifest, time.monotonic() - start


def on_cluster(
    config: RunConfig,
    logs: Path,
    stage: Callable[[Callable[..., Any]], Manifest],
    show: Callable[[str], Callable[[int, int], None]] = progress,
) -> Manifest:
    """Return ``stage(run_units)``; ``show(label)`` shows how many units of a phase are done. Ray starts when the
    first unit of work is due: a finished stage needs none.
    """
    with ExitStack() as stack:
        connected: list[Any] = []

        def execute(label: str, function: str, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
            if not connected:
                connected.append(stack.enter_context(connect(config.cluster)))
            return run_units(config.cluster, label, function, units, show(label), log_dir=logs)

        return stage(execute)


def describe(name: str, manifest: Manifest) -> str:
    """Return the figures of a stage as one line."""
    figures = manifest.figures
    if name == "curate":
        dropped = sum(figures["dropped"].values())
        return f"{figures['documents_read']:,} documents -> {figures['kept']:,} kept, {dropped:,} dropped"
    if name == "order":
        if figures["adjacent_similarity"] is None:
            return f"{figures['documents']:,} documents at random"
        return (
            f"{figures['documents']:,} documents, similarity of neighbours in the order "
            f"{figures['adjacent_similarity']:.2f} (random order: {abs(figures['random_similarity']):.2f})"
        )
    return (
        f"{figures['windows']:,} windows of {manifest.config['context']} tokens, vocabulary {figures['vocab_size']:,}, "
        f"{figures['padding_fraction']:.1%} padding"
    )


def drop_table(manifest: Manifest) -> str:
    """Return why documents were dropped, most frequent reason first."""
    dropped: dict[str, int] = manifest.figures["dropped"]
    rows = sorted(dropped.items(), key=lambda row: (-row[1], row[0]))
    return "\n".join(f"  {count:>9,}  {reason}" for reason, count in rows if count)


def main(name: str, config: RunConfig) -> int:
    for stage in CHAIN if name == "prepare" else (name,):
        run_and_say(stage, config)
    return 0


def run_and_say(name: str, config: RunConfig) -> None:
    """Runs a stage, prints what came of it, writes its report."""
    manifest, seconds = run_stage(name, config)
    if manifest.reused:
        print(f"{name}: nothing to do, complete since {manifest.created} (fingerprint {manifest.fingerprint[:12]})")
    print(f"{name}: {describe(name, manifest)}  [{format_seconds(seconds)}]", flush=True)
    if name == "curate":
        if table := drop_table(manifest):
            print(f"dropped, by reason:\n{table}")
        print(f"report: {write_report(config, manifest)}")
    if name == "order" and config.order.kind != "random" and manifest.figures["documents"] <= MOST_DOCUMENTS:
        print(f"report: {write_order_report(config, manifest)}", flush=True)
