"""``sundog ladder``: train small models that differ in what they were taught, and write the table of the ladder.

Every rung goes the way of any model (curate, order, pack, train, export) in a folder of its own below
``{preselect.dir}/ladder``; all share one tokenizer. What is finished is not repeated, an interrupted training goes on.
The corpus to select from is written too, so that a ladder, its scores and a selection need no download.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

from cluster.connection import connect
from conf.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from conf.preselect import RungConfig
from conf.rules import check
from conf.schema import RunConfig
from data.curate import curate
from data.files import digest_json, read_json, write_atomic
from data.order import order
from data.pack import pack
from data.preselect.ladder import Rung, write_ladder
from data.preselect.toy import MAKERS, write_corpus
from data.stages import serial_units
from data.tokenize import train_tokenizer
from launch.progress import format_seconds
from launch.train import stopped_line, train
from trainers.export import export


def check_ladder(config: RunConfig) -> None:
    """Raise ConfigError for a ladder that cannot be trained."""
    rungs, fix = config.ladder.rungs, "experiment=preselect_ladder"
    names = [rung.name for rung in rungs]
    if len(rungs) < 2 or len(set(names)) < len(names) or "" in names:
        raise ConfigError("ladder.rungs", ", ".join(names), "two rungs or more, each with a name of its own", fix)
    if not config.data.path:
        raise ConfigError("data.path", "(empty)", "the corpus to select from is written there", fix)
    for key, mixture in [("pool", config.ladder.pool), *((rung.name, rung.mixture) for rung in rungs)]:
        if not mixture or set(mixture) - set(MAKERS) or min(mixture.values()) < 0 or sum(mixture.values()) <= 0:
            rule = f"shares of {', '.join(MAKERS)}, not negative, not all 0"
            raise ConfigError(f"ladder: mixture of {key}", dict(mixture), rule, fix)


def _once(marker: Path, settings: object, *outputs: Path) -> bool:
    """Whether work with these settings is still to do; the caller writes the marker by ``_done``."""
    done = read_json(marker) if marker.is_file() else {}
    return done.get("digest") != digest_json(settings) or not all(path.exists() for path in outputs)


def _done(marker: Path, settings: object) -> None:
    write_atomic(marker, json.dumps({"digest": digest_json(settings)}))


def write_corpora(config: RunConfig) -> Path:
    """Write the pool, every rung's corpus and the shared tokenizer, unless they are there; returns the tokenizer."""
    root = Path(config.preselect.dir).absolute()
    pool, tokenizer = Path(config.data.path), root / "ladder" / "tokenizer"
    settings = [dataclasses.asdict(config.ladder), config.seed, config.data.vocab_size]
    marker = root / "ladder" / "corpora.json"
    if not _once(marker, settings, pool, tokenizer):
        return tokenizer
    paths = write_corpus(pool, config.ladder.pool, config.ladder.pool_documents, 2 * config.seed)
    for rung in config.ladder.rungs:  # odd seeds: no piece of prose of the pool
        folder = root / "ladder" / rung.name / "corpus"
        paths += write_corpus(folder, rung.mixture, rung.documents, 2 * config.seed + 1)
    train_tokenizer(_texts(paths), config.data.vocab_size, tokenizer)
    _done(marker, settings)
    return tokenizer


def _texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in itertools.islice(lines, 2000))


def rung_config(config: RunConfig, rung: RungConfig, tokenizer: Path) -> RunConfig:
    """The run that trains one rung."""
    root = Path(config.preselect.dir).absolute() / "ladder" / rung.name
    own = deepcopy(config)
    own.name, own.run_dir, own.export.dir = f"ladder-{rung.name}", str(root / "run"), str(root / "hf")
    own.data.path, own.data.dir, own.data.format = str(root / "corpus"), str(root / "data"), "jsonl"
    own.data.tokenizer, own.data.overwrite = str(tokenizer), True
    own.curation.preselect.enabled = False
    own.trainer.steps = rung.steps or config.trainer.steps
    own.trainer.warmup_steps = min(config.trainer.warmup_steps, own.trainer.steps)
    own.model.dim, own.model.layers = rung.dim or config.model.dim, rung.layers or config.model.layers
    return check(own)


def train_rung(own: RunConfig) -> bool:
    """Prepare, train and export one rung; False where it was asked to stop."""
    for stage in (curate, order, pack):
        stage(own, serial_units)  # small corpora: cheaper here than a Ray Data job
    result = train(own)
    if result["status"] == "stopped":
        print(stopped_line(result))
        return False
    export(own)
    return True


def main(name: str, config: RunConfig) -> int:
    check_ladder(config)
    begin = time.monotonic()
    tokenizer = write_corpora(config)
    rungs = [(rung, rung_config(config, rung, tokenizer)) for rung in config.ladder.rungs]
    with connect(config.cluster):
        for number, (rung, own) in enumerate(rungs, 1):
            start, folder = time.monotonic(), Path(own.export.dir)
            marker, settings = folder.parent / "done.json", [dataclasses.asdict(own), digest_json(config.ladder.pool)]
            if _once(marker, settings, folder):
                if not train_rung(own):
                    return EXIT_STOPPED
                _done(marker, settings)
            seconds = format_seconds(time.monotonic() - start)
            print(f"[{number}/{len(rungs)}] {rung.name}: {folder}  [{seconds}]", flush=True)
    write_ladder(config.preselect.ladder, [Rung(rung.name, own.export.dir) for rung, own in rungs])
    seconds = format_seconds(time.monotonic() - begin)
    print(f"ladder: {config.preselect.ladder}, {len(rungs)} models, corpus {config.data.path}  [{seconds}]")
    return EXIT_DONE
