"""Small packed folders, corpora and configs for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import RunConfig
from data.manifest import Manifest, write_manifest
from data.shards import shard_names, write_shard
from data.stages import record_files

TOPICS = ("rivers and lakes", "prime numbers", "bread ovens", "steam engines", "night skies")


def make_shards(
    folder: Path, documents: list[list[int]], context: int, *, vocab_size: int = 512, shards: int = 1, pad_id: int = 1
) -> Path:
    """A finished packed folder of the given documents (their EOS included), spread evenly over ``shards``."""
    counts, names = [], []
    for number, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        rows = ((int(i), np.array(documents[i])) for i in part)
        counts.append(write_shard(folder, number, rows, context, vocab_size, pad_id)["windows"])
        names += shard_names(number)
    figures: dict[str, Any] = {"vocab_size": vocab_size, "eos_id": 0, "pad_id": pad_id, "shard_windows": counts}
    settings = {"context": context, "tokenizer": "0" * 64}
    record = record_files(folder, names)
    write_manifest(folder, Manifest("pack", "f" * 64, "", settings, figures, record, "2026-01-01T00:00:00+00:00"))
    return folder


def text(topic: str, number: int, sentences: int = 12) -> str:
    """Distinct prose about a topic, long enough for the default filters."""
    words = topic.split()
    lines = [
        f"Note {number} of {topic}, item {i}: the {words[i % len(words)]} of day {number * i}."
        for i in range(sentences)
    ]
    return "\n".join(lines)


def write_jsonl(path: Path, documents: int, start: int = 0) -> Path:
    """A JSONL corpus of distinct documents about five topics in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"d{i}", "text": text(TOPICS[i % len(TOPICS)], i)} for i in range(start, start + documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(root: Path, corpus: Path | str, **data: Any) -> RunConfig:
    """A run over the user's corpus at ``corpus``, with stages below ``root / "data"``."""
    config = RunConfig(name="test", run_dir=str(root / "run"))
    config.data.name, config.data.source, config.data.path = "test", "path", str(corpus)
    config.data.dir = str(root / "data")
    config.data.context, config.data.vocab_size, config.data.shard_documents = 64, 320, 8
    config.order.dimensions, config.order.features, config.order.neighbours = 16, 4096, 5
    for name, value in data.items():
        setattr(config.data, name, value)
    return config
