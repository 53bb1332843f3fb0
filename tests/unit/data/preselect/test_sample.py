"""The sample, the ladder's table, the evaluation and the controls."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from conf.errors import DataError
from data.ingest import ingest
from data.preselect.controls import correlation, domain_share, permuted, reliability
from data.preselect.exercises import CHOICES, KINDS, facts, held_out, item_rows, items, teaching_document
from data.preselect.ladder import Rung, model_digest, read_ladder, write_ladder
from data.preselect.sample import domain_of, sample
from data.preselect.strength import strength
from data.preselect.toy import MAKERS, write_corpus
from data.stages import serial_units, stage_folders
from tests.unit.data.samples import make_config, write_jsonl


def draw(root: Path, shard: int, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    config = make_config(root / f"run{shard}", root / "c", shard_documents=shard)
    config.preselect.dir = str(root / f"run{shard}" / "preselect")
    for name, value in settings.items():
        setattr(config.preselect, name, value)
    manifest = sample(config, ingest(config, serial_units), stage_folders(config).documents, serial_units)
    folder = Path(config.preselect.dir) / "sample"
    return manifest, [
        row for part in manifest.figures["parts"] for row in pq.read_table(folder / part["file"]).to_pylist()
    ]


def test_sample_does_not_depend_on_how_the_corpus_is_cut(tmp_path: Path) -> None:
    for name, count, start in (("a", 20, 0), ("b", 12, 100), ("c", 3, 200)):
        write_jsonl(tmp_path / "c" / f"{name}.jsonl", count, start)
    (tmp_path / "c" / "d.jsonl").write_text((tmp_path / "c" / "c.jsonl").read_text().replace('"d2', '"e2'))
    first, rows = draw(tmp_path, 4, domains=3, per_domain=5, items=2)
    assert Counter(row["source"] for row in rows) == {"a.jsonl": 5, "b.jsonl": 5, "c.jsonl": 3}
    assert first.figures["domains"]["a.jsonl"] == {"documents": 20, "drawn": 5}
    for shard in (1, 50):
        again, others = draw(tmp_path, shard, domains=3, per_domain=5, items=2)
        assert {row["id"] for row in others} == {row["id"] for row in rows}
        assert again.figures["documents"] == 13
    _, every = draw(tmp_path, 7, domains=0, per_domain=100, items=2)
    assert len(every) == len({row["text"] for row in every}) == 35  # d.jsonl repeats the texts of c.jsonl


def test_nothing_to_sample_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c" / "a.jsonl", 3)
    with pytest.raises(DataError, match="min_chars"):
        draw(tmp_path, 4, min_chars=10**6)


def test_domain_of_a_document() -> None:
    row = {"source": "s", "url": "https://www.example.org/page"}
    assert (domain_of(row, "source"), domain_of(row, "host")) == ("s", "example.org")
    assert domain_of({"source": "s", "url": ""}, "host") == "s"


def test_ladder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rungs = [
        Rung("a", str(tmp_path / "m/a"), {"x": 1.0, "y": 2.0}, 0.5),
        Rung("b", str(tmp_path.parent / "b"), {"x": 4}),
    ]
    write_ladder(tmp_path / "ladder.yaml", rungs)
    found = read_ladder(tmp_path / "ladder.yaml")
    assert found == rungs
    assert [rung.ability for rung in found] == [1.5, 4.0]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("models: 3", "list of models"),
        ("[", "YAML table"),
        ({"models": [{"folder": "a"}]}, "at least two"),
        ({"models": [{"folder": "a"}, {"folder": "a"}]}, "name of its own"),
        ({"models": [{"name": "a"}, {"folder": "b"}]}, "folder is needed"),
        ({"models": [{"folder": "a", "score": 1}, {"folder": "b"}]}, "unknown score"),
        ({"models": [{"folder": "a", "weight": -1}, {"folder": "b"}]}, "not negative"),
        ({"models": [{"folder": "a", "ability": float("nan")}, {"folder": "b"}]}, "finite"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, table: Any, words: str) -> None:
    (tmp_path / "l.yaml").write_text(table if isinstance(table, str) else yaml.safe_dump(table))
    with pytest.raises(DataError, match=words):
        read_ladder(tmp_path / "l.yaml")


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "b" / "sundog.json").write_text("where it came from")
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"weightz")
    assert model_digest(tmp_path / "a") != model_digest(tmp_path / "b")
    with pytest.raises(DataError, match="not there"):
        model_digest(tmp_path / "c")


def test_items_have_one_right_answer_and_sums_are_never_taught() -> None:
    found = items(40, 1)
    assert set(found) == set(KINDS)
    for kind, asked in found.items():
        for prompt, choices in asked:
            assert len(set(choices)) == CHOICES
            words = prompt.split()
            if kind == "sums":
                a, b = int(words[0]), int(words[2])
                assert choices[0] == f"{a + b}."
                assert held_out(a, b)
            elif kind == "facts":
                assert choices[0] == facts()[words[3]] + "."
            elif kind == "copies":
                assert choices[0] == words[words.index("Again:") - 1]
            else:
                assert f"{words[-2]} is {choices[0]}" in prompt
    taught = [line.split() for n in range(200) for line in teaching_document(n, 0).splitlines() if " plus " in line]
    assert taught
    assert not any(held_out(int(line[0]), int(line[2])) for line in taught)
    rows = item_rows(3, 0)
    assert len(rows) == 3 * CHOICES * len(KINDS)
    assert rows == item_rows(3, 0) != item_rows(3, 1)


def test_toy_corpus_is_its_seed(tmp_path: Path) -> None:
    mixture = dict.fromkeys(MAKERS, 1.0)
    texts = [
        [p.read_bytes() for p in write_corpus(tmp_path / str(i), mixture, 20, seed)] for i, seed in enumerate((0, 0, 1))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_reliability_and_domains() -> None:
    random = np.random.default_rng(0)
    signal, domains = random.normal(size=4000), random.choice(["a", "b"], 4000)
    halves = signal + random.normal(size=4000), signal + random.normal(size=4000)
    found = reliability(halves)
    assert found["split_half"] == pytest.approx(0.5, abs=0.05)
    assert found["spearman_brown"] == pytest.approx(2 / 3, abs=0.05)
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))
    assert domain_share((domains == "a").astype(float), domains) == pytest.approx(1.0)
    assert domain_share(signal, domains) < 0.01


def test_permuted_rankings_tell_a_true_one_from_chance() -> None:
    """Losses that follow the abilities in one domain and nothing in the other."""
    random = np.random.default_rng(1)
    abilities, domains = np.arange(6.0), np.repeat(["follows", "noise"], 300)
    losses = random.normal(size=(6, 600))
    losses[:, :300] -= abilities[:, None]
    halves = losses + random.normal(size=losses.shape), losses + random.normal(size=losses.shape)
    found = permuted(losses, abilities, halves, domains, seed=0)
    assert found["mean strength"]["true"] == pytest.approx(strength(losses, abilities).mean())
    assert found["mean strength"]["p"] < 0.02
    assert found["variance between domains"]["p"] < 0.02
    noise = permuted(losses[:, 300:], abilities, (halves[0][:, 300:], halves[1][:, 300:]), domains[300:], seed=0)
    assert noise["mean strength"]["p"] > 0.02
    assert permuted(losses * np.nan, abilities, halves, domains, seed=0) == {}
