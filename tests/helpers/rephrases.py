"""A small corpus for rephrasing, settings for it, and a server's answers to its prompts: rephrases by hand."""

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rephrase_labels import DATA

ENTRIES: list[dict[str, str]] = [
    entry for file in ("clean_a", "clean_b") for entry in yaml.safe_load((DATA / f"{file}.yaml").read_text())
]
GERMAN = (
    "Die Brücke wurde im Jahre 1934 nach sechs Jahren Arbeit eröffnet. Sie ist 412 Meter lang und trägt jeden Tag etwa "
    "18.000 Fahrzeuge zwischen den beiden Städten, weil der Fluss dort tief ist und keine Pfeiler möglich waren."
)
STYLE_WORDS = {"child": "easy", "encyclopaedia": "medium", "scholars": "hard", "conversation": "qa"}


def good_answer(body: dict[str, Any]) -> str:
    """The rephrase that is written down for the source and style of a prompt; else the source itself."""
    asked = body["messages"][1]["content"]
    entry = next((entry for entry in ENTRIES if entry["source"] in asked), None)
    style = next(name for word, name in STYLE_WORDS.items() if word in asked)
    text = entry.get(style, entry["source"]) if entry else "I'm sorry, but I cannot rewrite this text."
    return f"<rewrite>\n{text}\n</rewrite>"


def rephrase_settings(folder: Path) -> list[str]:
    """Writes the corpus below ``folder``; returns the overrides of a run over it, without the server's address."""
    texts = [entry["source"] for entry in ENTRIES] + [GERMAN, "One sentence.", "def f(x):\n    return x + 1\n" * 10, ""]
    lines = [
        json.dumps({"id": f"doc{i}", "text": text}) for i, text in enumerate([*texts, texts[0].replace("six", "6")])
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return [
        "data=path",
        f"data.path={folder}/corpus.jsonl",
        f"data.dir={folder}/data",
        f"run_dir={folder}/run",
        "data.vocab_size=400",
        "data.context=64",
        "data.shard_documents=8",
        "curation=none",
        "order=random",
        "rephrase.model=m",
        "rephrase.styles=[easy,medium,hard,qa]",
        "rephrase.slots=4",
        "rephrase.retries=1",
        "rephrase.retry_sec=0",
        "rephrase.per_chunk=2",
        "rephrase.low=0",
        "rephrase.high=0.5",
    ]
