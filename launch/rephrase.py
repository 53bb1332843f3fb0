"""``sundog rephrase``: the curated corpus through chunks, a model, filters and the mixer to packed windows (WRAP).

Each stage that is done is not repeated, a killed one goes on where it was, and an answered request is never sent again.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import EXIT_DONE
from conf.schema import RunConfig
from data.manifest import Manifest
from data.rephrase.answers import GENERATE, Generator, answers, endpoint_generator
from data.rephrase.judge import find_repeats, judge_answers, provenance
from data.rephrase.mix import mix
from data.rephrase.prepare import folder_of, prepare
from data.rephrase.pulse import forget_pulses, read_pulses
from data.rephrase.report import ACCEPTED, rows_of, write_report
from data.rephrase.styles import load_styles
from launch.progress import format_seconds, progress
from launch.stages import STAGES, describe, on_cluster

STEPS = 7
WATCH_SEC = 1.0


def generator_of(config: RunConfig) -> tuple[Generator, str]:
    """Who answers, and what counts tokens: a tokenizer's folder, or nothing."""
    if config.rephrase.endpoint:
        return endpoint_generator(config), config.rephrase.tokenizer
    from inference.rephrase import engine_generator  # torch loads here, after mistakes in the config

    workers = config.cluster.workers or os.cpu_count() or 1
    generator, folder = engine_generator(config, workers)
    return generator, config.rephrase.tokenizer or str(folder)


def rephrase(
    config: RunConfig, generator: Generator, tokenizer: str, run_units: Any, say: Callable[..., None]
) -> Manifest:
    """Runs every stage in turn; ``say(number, name, text, seconds)`` hears of each. Returns the packed manifest."""
    start = time.monotonic()

    def done(number: int, name: str, manifest: Manifest, text: str) -> None:
        nonlocal start
        say(number, name, text + (" (already done)" if manifest.reused else ""), time.monotonic() - start)
        start = time.monotonic()

    wanted = config.rephrase
    styles = load_styles(wanted.styles, wanted.style_files)
    curated = STAGES["curate"](config, run_units)
    done(1, "curate", curated, describe("curate", curated))
    prepared = prepare(config, generator.model, tokenizer, run_units)
    figures = prepared.figures
    done(
        2,
        "chunks",
        prepared,
        f"{figures['chunks']:,} chunks, {figures['requests']:,} requests: {_counts(figures['by_style'])}",
    )
    scorer = str(Path(wanted.scorer).expanduser().absolute() / "linear") if wanted.scorer else ""

    def run_watched(label: str, function: str, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with watching(folder_of(config, "store"), figures["requests"] if label == GENERATE else 0):
            return run_units(label, function, units)

    answered = answers(config, prepared, generator, run_watched, tokenizer, scorer)
    made = answered.figures["generated"]
    text = f"{made['answered']:,} answered, {made['refused']:,} refused, {made['cached']:,} from the cache"
    done(3, "answers", answered, f"{generator.name}: {text}, {answered.figures['tokens']:,} tokens")
    judged = judge_answers(config, answered, tokenizer, scorer, run_units)
    dropped = find_repeats(config, judged, run_units)
    reasons: dict[str, int] = {}
    for _, _, reason in rows_of(config, judged, dropped):
        reasons[reason] = reasons.get(reason, 0) + 1
    rejected = {name: number for name, number in reasons.items() if name != ACCEPTED}
    done(4, "filters", judged, f"{reasons.get(ACCEPTED, 0):,} accepted; rejected: {_counts(rejected)}")
    sampling = {"temperature": wanted.temperature, "top_p": wanted.top_p}
    mixed = mix(config, judged, dropped, provenance(generator, styles, sampling), run_units)
    tokens = mixed.figures["tokens"]
    done(
        5,
        "mix",
        mixed,
        f"{tokens['real']:,} real and {tokens['synthetic']:,} synthetic tokens ({mixed.figures['share']:.2%})",
    )
    packed = pack_mix(config, run_units)
    done(6, "pack", packed, describe("pack", packed))
    stages = {"requests": prepared, "answers": answered, "judged": judged, "mix": mixed}
    done(7, "report", packed, str(write_report(config, stages, dropped)))
    return packed


@contextmanager
def watching(folder: Path, requests: int) -> Iterator[None]:
    """Shows, while requests are answered, how many are, how fast, and the share that the filters let pass."""
    forget_pulses(folder)
    if not requests:
        yield
        return
    show, ended, begin = progress("rephrase: requests"), threading.Event(), time.monotonic()

    def look() -> None:
        while not ended.wait(WATCH_SEC):
            if found := read_pulses(folder):
                show(found["cached"] + found["done"], requests, live_line(found, time.monotonic() - begin))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if found := read_pulses(folder):
            show(requests, requests, live_line(found, time.monotonic() - begin))


def live_line(found: dict[str, int], seconds: float) -> str:
    """What a generator's counts say of its pace and of its answers."""
    share = found["accepted"] / max(1, found["judged"])
    line = f"{found['done'] / seconds:.1f} answers/s, {found['tokens'] / seconds:,.0f} tokens/s"
    line += f", {share:.0%} of {found['judged']:,} judged are accepted"
    return line + (f", {found['retried']:,} attempts repeated" if found.get("retried") else "")


def pack_mix(config: RunConfig, run_units: Any) -> Manifest:
    """Orders and packs ``{data.dir}/mixed`` with the tokenizer that counted its tokens."""
    own = copy.deepcopy(config)
    root = Path(config.data.dir).expanduser().absolute()
    own.data.dir, own.data.tokenizer, own.data.overwrite = str(root / "mixed"), str(root / "tokenizer"), True
    STAGES["order"](own, run_units)
    return STAGES["pack"](own, run_units)


def show_units(label: str) -> Callable[[int, int], None]:
    """How far a phase is; of the one that asks, ``watching`` says more than its few units do."""
    return progress(label) if label != GENERATE else lambda done, total: None


def _counts(counts: dict[str, int]) -> str:
    """Counts in one line, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number:,}" for name, number in ordered) or "none"


def main(name: str, config: RunConfig) -> int:
    begin = time.monotonic()

    def say(number: int, step: str, text: str, seconds: float) -> None:
        print(f"[{number}/{STEPS}] {step:<7} {text}  [{format_seconds(seconds)}]", flush=True)

    generator, tokenizer = generator_of(config)
    logs = Path(config.data.dir) / "logs"
    on_cluster(config, logs, lambda run_units: rephrase(config, generator, tokenizer, run_units, say), show_units)
    mixed, seconds = Path(config.data.dir) / "mixed", format_seconds(time.monotonic() - begin)
    print(f"train on it: sundog train data.dir={mixed} order={config.order.kind}   all of it: {seconds}")
    return EXIT_DONE
