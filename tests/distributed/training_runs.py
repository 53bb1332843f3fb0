"""Tiny packed data, configs and rank functions for the training tests."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import RunConfig
from data.manifest import Manifest, write_manifest
from data.shards import shard_names, write_shard
from data.stages import record_files, stage_folders
from data.tokenize import load_tokenizer, train_tokenizer
from trainers.journal import read_journal

CONTEXT = 64
TOPICS = ("rivers and lakes", "prime numbers", "bread ovens", "steam engines", "night skies")


def documents(count: int) -> list[str]:
    """Short texts of different lengths."""
    return [
        " ".join(f"Note {n} of {TOPICS[n % 5]}, item {i}: {TOPICS[(n * i) % 5]}." for i in range(1 + n % 7))
        for n in range(count)
    ]


def make_config(root: Path, name: str, **changes: Any) -> RunConfig:
    """A run of 20 steps on one rank; ``changes`` are ``group__key=value``."""
    config = RunConfig(name=name, run_dir=str(root / "runs" / name), seed=3)
    config.data.dir, config.data.context, config.data.eval_fraction = str(root / "data"), CONTEXT, 0.05
    config.export.dir = str(root / "runs" / name / "hf")
    config.model.dim, config.model.layers, config.model.heads, config.model.kv_heads = 32, 2, 4, 2
    trainer = config.trainer
    trainer.steps, trainer.batch, trainer.micro_batch, trainer.warmup_steps, trainer.lr = 20, 4, 4, 4, 1e-2
    trainer.checkpoint_every, trainer.eval_every, trainer.eval_windows, trainer.log_every = 100, 20, 3, 5
    config.sequence.strategy = "local"
    for key, value in changes.items():
        group, _, leaf = key.partition("__")
        setattr(getattr(config, group), leaf, value)
    return config


def make_data(config: RunConfig, texts: list[str] | None = None) -> None:
    """Tokenizer and packed windows where ``config`` looks for them."""
    folders = stage_folders(config)
    texts = texts or documents(120)
    train_tokenizer(texts, 300, folders.tokenizer)
    tokenizer = load_tokenizer(folders.tokenizer)
    rows = [(n, np.array([*tokenizer.encode(text), tokenizer.eos_id])) for n, text in enumerate(texts)]
    folders.packed.mkdir(parents=True, exist_ok=True)
    context = config.data.context
    counts = write_shard(folders.packed, 0, rows, context, tokenizer.vocab_size, tokenizer.pad_id)
    figures: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "shard_windows": [counts["windows"]],
    }
    lineage = [{"stage": "order", "fingerprint": "o" * 64, "config": {}, "figures": {"adjacent_similarity": 0.5}}]
    settings = {"context": context, "tokenizer": tokenizer.digest}
    record = record_files(folders.packed, shard_names(0))
    created = "2026-01-01T00:00:00+00:00"
    write_manifest(folders.packed, Manifest("pack", "f" * 64, "o" * 64, settings, figures, record, created, lineage))


@dataclass
class Recorder:
    """A control that keeps events and asks to stop after ``stop_after`` steps of this process."""

    stop_after: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(copy.deepcopy(event))

    def stopping(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_after


@dataclass
class Case:
    """One run of a group of ranks; the last rank alone asks to stop after ``stop_after`` steps."""

    config: RunConfig
    stop_after: int = 0


def run_case(case: Case, rank: int, world_size: int) -> dict[str, Any]:
    """Train; returns what ``run`` returned, with the events."""
    from trainers.pretrain import run

    case.config.cluster.ranks = world_size
    control = Recorder(case.stop_after if rank == world_size - 1 else 0)
    return {**run(case.config, control), "events": control.events}


def run_cases(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Train all cases, one after another, in the process group that exists."""
    return [run_case(case, rank, world_size) for case in cases]


def curve(config: RunConfig, name: str = "train/loss") -> list[float]:
    """A metric of every step from the run's metrics.jsonl; the steps must be 1, 2, 3 and so on."""
    records = read_journal(Path(config.run_dir) / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record[name] for record in records if name in record]
