"""Packing: every token of every document once, in order, whatever the number of workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from conf.curate import CurationConfig
from conf.errors import DataError
from conf.schema import RunConfig
from data.curate import curate
from data.manifest import Manifest
from data.order import ORDER, order
from data.pack import batches, pack
from data.shards import open_shards
from data.stages import StageFolders, Unit, serial_units, stage_folders
from data.tokenize import load_tokenizer
from tests.unit.data.samples import make_config, write_jsonl


def prepared(root: Path, documents: int = 30, **data: Any) -> RunConfig:
    config = make_config(root, write_jsonl(root / "c.jsonl", documents), **data)
    curate(config, serial_units)
    order(config, serial_units)
    return config


def texts_in_order(folders: StageFolders, curated: Manifest) -> list[str]:
    parts = [pq.read_table(folders.curated / part["file"]) for part in curated.figures["parts"]]
    texts = [text for part in parts for text in part.column("text").to_pylist()]
    return [texts[i] for i in np.load(folders.ordered / ORDER)]


@pytest.mark.parametrize(("context", "documents"), [(64, 30), (4096, 30), (7, 3)])
def test_windows_hold_every_document_in_order(tmp_path: Path, context: int, documents: int) -> None:
    config = prepared(tmp_path, documents, context=context, packing="concat")
    folders = stage_folders(config)
    manifest = pack(config, serial_units)
    shards, tokenizer = open_shards(folders.packed), load_tokenizer(folders.tokenizer)
    shards.require_tokenizer(tokenizer.digest)
    tokens, ids = shards.windows(np.arange(len(shards)))
    real = ids >= 0
    texts = texts_in_order(folders, curate(config, serial_units))
    for number, text in enumerate(texts):
        mine = tokens[ids == number].tolist()
        assert mine.pop() == tokenizer.eos_id
        assert tokenizer.decode(mine) == text
    assert np.all(np.diff(ids[real]) >= 0)
    assert set(tokens[~real].tolist()) <= {tokenizer.pad_id}
    figures = manifest.figures
    assert figures["documents"] == documents
    assert figures["tokens"] == real.sum()
    assert figures["windows"] == len(shards) == sum(figures["shard_windows"])
    assert figures["padding_fraction"] == pytest.approx((~real).mean(), abs=1e-6)
    assert figures["vocab_size"] == tokenizer.vocab_size
    ends = np.cumsum(figures["shard_windows"]) - 1
    assert set(np.flatnonzero((~real).any(axis=1))) <= set(ends.tolist())
    assert pack(config, serial_units).reused


def test_bytes_do_not_depend_on_who_works_when(tmp_path: Path) -> None:
    def backwards_and_twice(label: str, function: str, units: list[Unit]) -> list[Unit]:
        serial_units(label, function, units[::-1])
        return serial_units(label, function, units)

    one, two = prepared(tmp_path / "one"), prepared(tmp_path / "two")
    assert pack(one, serial_units).files == pack(two, backwards_and_twice).files


def test_other_context_uses_the_same_tokens(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    first = pack(config, serial_units)
    config.data.context = 32
    second = pack(config, serial_units)
    assert second.figures["tokens"] == first.figures["tokens"]
    assert second.figures["windows"] > first.figures["windows"]
    assert second.config["tokenized"] == first.config["tokenized"]
    assert open_shards(tmp_path / "data" / "packed-matching-64").context == 64


def test_given_tokenizer_is_used(tmp_path: Path) -> None:
    config = prepared(tmp_path / "one")
    pack(config, serial_units)
    given = stage_folders(config).tokenizer
    other = prepared(tmp_path / "two", 10, tokenizer=str(given))
    pack(other, serial_units)
    shards = open_shards(stage_folders(other).packed)
    shards.require_tokenizer(load_tokenizer(given).digest)
    other.data.tokenizer = ""
    with pytest.raises(DataError, match="tokenizer"):
        pack(other, serial_units)
    other.data.tokenizer = str(tmp_path / "gone")
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        pack(other, serial_units)


def test_pack_needs_an_order_of_the_documents_as_they_are(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 12))
    curate(config, serial_units)
    with pytest.raises(DataError, match="sundog order"):
        pack(config, serial_units)
    order(config, serial_units)
    before = pack(config, serial_units)
    config.curation.min_chars, config.data.overwrite = 100, True
    after = curate(config, serial_units)
    with pytest.raises(DataError, match="sundog order") as caught:
        pack(config, serial_units)
    assert before.lineage[-3]["fingerprint"][:16] in str(caught.value)
    assert after.fingerprint[:16] in str(caught.value)
    order(config, serial_units)
    assert pack(config, serial_units).parent != before.parent


def test_truncated_tokens_are_found_and_mended(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    pack(config, serial_units)
    path = stage_folders(config).packed / "tokens-00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"tokens-00001\.bin"):
        open_shards(path.parent)
    assert not pack(config, serial_units).reused
    assert path.read_bytes() == content


def test_part_that_lost_all_of_its_documents(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("c", 10)):
        write_jsonl(tmp_path / "c" / f"{name}.jsonl", 8, start=start)
    (tmp_path / "c" / "b.jsonl").write_text('{"text": "short"}\n' * 8)
    config = make_config(tmp_path, tmp_path / "c")
    assert [part["documents"] for part in curate(config, serial_units).figures["parts"]] == [8, 0, 8]
    order(config, serial_units)
    assert pack(config, serial_units).figures["documents"] == 16


def test_batches_are_bounded() -> None:
    texts = ["a" * 400_000] * 5 + ["b"] * 150
    groups = list(batches(texts))
    assert [text for group in groups for text in group] == texts
    assert [len(group) for group in groups] == [3, 64, 64, 24]


def test_a_worker_tokenises_any_number_of_parts_in_the_same_memory(tmp_path: Path) -> None:
    rng, held = np.random.default_rng(0), []
    texts = [" ".join(f"{word:x}" for word in rng.integers(2**24, 2**28, 2000)) for _ in range(120)]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    config = make_config(tmp_path, corpus, shard_documents=4)
    config.curation = CurationConfig(1, 0, 0, 0.0, 0.0, 0.0)
    curate(config, serial_units)
    config.order.kind = "random"
    order(config, serial_units)

    def units_and_memory(label: str, function: str, units: list[Unit]) -> list[Unit]:
        results = []
        for unit in units:
            results += serial_units(label, function, [unit])
            if label == "pack: tokenize":
                held.append(psutil.Process().memory_full_info().uss)
        return results

    pack(config, units_and_memory)
    assert len(held) == 30
    assert held[-1] - held[4] < 4 * 2**20, "25 parts more take no more memory"
