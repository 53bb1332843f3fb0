"""Histories, verification and the report of a finished curation; what a change makes run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError
from conf.schema import RunConfig
from data.curate import curate
from data.curation_report import write_report
from data.history import verify, why
from data.stages import serial_units, stage_folders
from tests.unit.data.samples import TOPICS, make_config, text

URLS = {"bad": "https://blocked.example/x"}


def make(root: Path) -> RunConfig:
    """Three files, near duplicates and address lists on, masked mail."""
    for number in range(3):
        rows = [{"id": f"d{number}-{i}", "text": text(TOPICS[i % 5], 10 * number + i)} for i in range(6)]
        extra = {"id": "bad", "text": text("coal", 1), "url": URLS["bad"]} if number == 1 else None
        mail = {"id": "mail", "text": "Write to someone@example.net now.\n" + text("post", 2)} if number == 2 else None
        lines = [json.dumps(row) for row in [*rows, extra, mail] if row]
        (root / f"{number}.jsonl").write_text("\n".join([*lines, "broken"]) + "\n")
    (root / "lists").mkdir()
    (root / "lists" / "domains").write_text("blocked.example\n")
    config = make_config(root, str(root / "*.jsonl"), shard_documents=100)
    config.curation.url.enabled, config.curation.url.domains = True, str(root / "lists" / "domains")
    config.curation.pii.enabled = config.curation.minhash.enabled = True
    return config


def test_history_report_and_verification(tmp_path: Path) -> None:
    config = make(tmp_path)
    manifest = curate(config, serial_units)
    kept, dropped, masked = (why(config, name) for name in ("d0-1", "bad", "mail"))
    assert kept["decision"] == "kept"
    assert kept["measured"]["rules"]["chars"] == kept["chars"] == len(text(TOPICS[1], 1))
    assert (dropped["decision"], dropped["url"]) == ("dropped: url_domain", URLS["bad"])
    assert masked["decision"] == "kept"
    assert masked["text"].startswith("Write to email@example.com now.")
    assert why(config, "0.jsonl:7")["decision"] == "dropped: invalid_json"
    with pytest.raises(DataError, match="nobody"):
        why(config, "nobody")

    page = write_report(config, manifest).read_text()
    for word in ("url_domain", "invalid_json", "rules: chars", "kept", "d0-0"):
        assert word in page
    assert manifest.figures["edited"] == 1

    assert all(not wrong for _, _, wrong in verify(config, 1.0).values())
    victim = stage_folders(config).curated / manifest.figures["parts"][0]["file"]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert verify(config, 1.0)["curated"][2] == [manifest.figures["parts"][0]["file"]]
    with pytest.raises(DataError, match=r"data\.dir"):
        verify(make_config(tmp_path / "empty", tmp_path), 1.0)


class Counting:
    """An executor that counts the units whose work was not done before, by phase (and by step)."""

    def __init__(self) -> None:
        self.ran: dict[str, int] = {}

    def __call__(self, label: str, function: str, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
        waiting = [step for unit in units for step in unit.get("steps", [unit]) if not Path(step["marker"]).exists()]
        for unit in waiting:
            name = Path(unit["marker"]).name.split("-")[0]
            self.ran[name] = self.ran.get(name, 0) + 1
        return serial_units(label, function, units)


def again(config: RunConfig) -> dict[str, int]:
    counting = Counting()
    curate(config, counting)
    return counting.ran


def teach(path: Path, epochs: int) -> None:
    """A fastText model at ``path`` that calls every text English."""
    import fasttext

    lines = path.with_suffix(".txt")
    lines.write_text(
        "".join(f"__label__{name} {text(topic, 3)!r}\n" for name in ("en", "en", "de") for topic in TOPICS)
    )
    model = fasttext.train_supervised(str(lines), epoch=epochs, dim=4, thread=1, verbose=0, bucket=100)
    model.save_model(str(path))


def test_another_model_at_the_same_path_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    config = make(tmp_path)
    config.curation.language.enabled, config.curation.language.min_score = True, 0.0
    config.curation.language.model = str(tmp_path / "model.bin")
    teach(tmp_path / "model.bin", 5)
    assert again(config)["language"] == 1
    teach(tmp_path / "model.bin", 5)  # the same bytes with another date
    assert again(config) == {}
    config.data.overwrite = True
    teach(tmp_path / "model.bin", 6)
    ran = again(config)
    assert ran["language"] == 1
    assert not {"read", "url", "identity", "minhash", "pii", "select"} & set(ran)


def test_exactly_what_a_change_touches_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.corpora.SLICE_BYTES", 2000)  # a slice a file
    config = make(tmp_path)
    first = again(config)
    assert (first["read"], first["rules"], first["select"], first["url"], first["minhash"]) == (3, 6, 3, 3, 3)
    assert again(config) == {}
    config.data.overwrite = True

    config.curation.min_chars = 201  # a threshold: decisions alone, no part is written again
    ran = again(config)
    assert ran["rules"] == 3
    assert not {"read", "url", "identity", "minhash", "pii", "select"} & set(ran)

    (tmp_path / "lists" / "domains").write_text("other.example\n")  # a list at the same path: its step alone
    ran = again(config)
    assert ran["url"] == 3
    assert ran["select"] == 1  # of the part with the document that is blocked no more
    assert not {"read", "identity", "minhash", "pii"} & set(ran)

    path = tmp_path / "2.jsonl"  # one file of three
    path.write_text(path.read_text() + json.dumps({"id": "new", "text": text("new things", 5)}) + "\n")
    ran = again(config)
    assert [ran[name] for name in ("read", "url", "identity", "minhash", "pii", "select")] == [1] * 6
