"""Address lists, languages, masks and evaluation sets: what each finds, and that their files decide."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from conf.curate import CurationConfig
from conf.errors import ConfigError, DataError
from data.annotators import Annotator, Documents
from data.documents import SCHEMA
from data.steps import decontaminate, language, url
from data.steps.decontaminate import Decontaminate
from data.steps.kind import apply_edits
from data.steps.language import Language
from data.steps.pii import Pii
from data.steps.url import Url, bare

ENGLISH = "The committee met in the morning and agreed that the bridge should be built before the winter comes. " * 3
GERMAN = (
    "Der Ausschuss tagte am Morgen und beschloss, dass die Brücke noch vor dem Winter gebaut werden soll. "
    "Die Stadt hat dafür genug Geld, aber es fehlen ihr die Arbeiter, und niemand weiß, woher sie kommen sollen. "
    "Deshalb schreibt der Bürgermeister heute einen Brief an seine Nachbarn, in dem er sie um Hilfe bittet."
)


def table(annotator: Annotator, documents: Documents) -> pa.Table:
    columns = annotator.columns(documents)
    return pa.Table.from_pydict({f.name: pa.array(columns[f.name], f.type) for f in annotator.SCHEMA})


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("https://bad.example/x", (True, False, False, 0)),
        ("http://www.sub.bad.example:80/x", (True, False, False, 0)),
        ("https://notbad.example/", (False, False, False, 0)),
        ("https://good.example/page/?q=1", (False, True, False, 0)),
        ("https://good.example/free-porn-here", (False, False, True, 0)),
        ("https://essex.example/sussex", (False, False, False, 0)),
        ("https://good.example/casino_bonus/poker", (False, False, False, 2)),
        ("", (False, False, False, 0)),
        ("http://[broken", (False, False, False, 0)),
    ],
)
def test_addresses(tmp_path: Path, address: str, found: tuple[bool, bool, bool, int]) -> None:
    (tmp_path / "domains").write_text("# blocked\nbad.example\nOther.Example # why\n")
    (tmp_path / "urls").write_text("http://good.example/page?q=1\n")
    (tmp_path / "soft").write_text("casino\npoker\n")
    domains, urls, soft = (str(tmp_path / name) for name in ("domains", "urls", "soft"))
    step = Url(domains, urls, "", soft)
    assert step.look(address) == found


def test_address_lists_decide_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "domains"
    path.write_text("bad.example\n")
    before = Url(str(path), "", "", "").fingerprint()
    moved = tmp_path / "moved"
    moved.write_text("bad.example\n")
    assert Url(str(moved), "", "", "").fingerprint() == before
    path.write_text("worse.example\n")
    assert Url(str(path), "", "", "").fingerprint() != before
    with pytest.raises(DataError, match="gone"):
        Url(str(tmp_path / "gone"), "", "", "").fingerprint()
    assert bare("HTTPS://user@WWW.Example.org/A/") == "example.org/A"


def test_soft_words_need_several(tmp_path: Path) -> None:
    (tmp_path / "soft").write_text("casino\npoker\n")
    rows = [
        {"id": str(i), "text": "", "url": f"https://x.example/{p}"} for i, p in enumerate(["casino", "casino/poker"])
    ]
    documents = Documents(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    columns = table(Url("", "", "", str(tmp_path / "soft")), documents)
    verdicts = {name: mask.tolist() for name, mask in url.reasons(columns, CurationConfig())}
    assert verdicts["url_soft_words"] == [False, True]
    assert verdicts["url_word"] == [False, False]


def test_languages() -> None:
    columns = table(Language(""), Documents.of([ENGLISH, GERMAN, "", "0101 1100"]))
    assert columns.column("language").to_pylist()[:2] == ["en", "de"]
    config = CurationConfig()
    dropped = {name: mask.tolist() for name, mask in language.reasons(columns, config)}
    assert dropped["language_unknown"][:2] == [False, False]
    assert dropped["language_unknown"][3] or dropped["language_other"][3]
    assert dropped["language_other"][:2] == [False, True]
    config.language.languages = []
    assert not any(dict(language.reasons(columns, config))["language_other"])


def test_a_language_model_by_path(tmp_path: Path) -> None:
    import fasttext

    lines = [f"__label__{name} {text}" for name, text in (("en", ENGLISH), ("de", GERMAN)) for _ in range(20)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=20, dim=8, thread=1, verbose=0, bucket=1000)
    model.save_model(str(tmp_path / "model.bin"))
    columns = table(Language(str(tmp_path / "model.bin")), Documents.of([ENGLISH, GERMAN + "\n" + GERMAN]))
    assert columns.column("language").to_pylist() == ["en", "de"]
    config = CurationConfig()
    config.language.model, config.language.min_score = "model.bin", 0.5
    assert dict(language.reasons(columns, config))["language_unknown"].tolist() == [False, False]
    (tmp_path / "broken.bin").write_bytes(b"no model")
    with pytest.raises(DataError, match="fastText"):
        Language(str(tmp_path / "broken.bin")).columns(Documents.of(["x"]))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to email@example.com."),
        ("From 8.8.8.8 to 10.0.0.1, version 1.2.3.4.5", "From 192.0.2.1 to 10.0.0.1, version 1.2.3.4.5"),
        ("Call +44 (20) 7946-0958 now", "Call +10000000000 now"),
        ("Nothing @ home, 3.14 and 1+2=3", "Nothing @ home, 3.14 and 1+2=3"),
    ],
)
def test_masks(text: str, masked: str) -> None:
    columns = table(Pii(True, True, True), Documents.of([text]))
    assert apply_edits(text, columns.column("pii_edits").to_pylist()[0]) == masked
    assert apply_edits(text, list(Pii(False, False, False).find(text))) == text


def test_evaluation_sets_are_found_in_documents(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(40)]
    item = {"question": " ".join(words[:20]), "choices": ["yes", "no"], "more": [{"hint": " ".join(words[20:29])}]}
    (tmp_path / "set.jsonl").write_text(json.dumps(item) + "\n\n")
    (tmp_path / "plain.txt").write_text("one\n\n" + " ".join(words[:13][::-1]))
    step = Decontaminate(str(tmp_path), 13)
    texts = [
        "Before it. " + " ".join(words[2:16]).upper() + ", and after.",
        " ".join(words[:12]),
        "xyz " + " ".join(words[20:29]),
        " ".join(words[:13][::-1]),
        "yes no one",
        "",
    ]
    columns = table(step, Documents.of(texts))
    assert columns.column("matches").to_pylist() == [2, 0, 1, 1, 0, 0]
    config = CurationConfig()
    assert dict(decontaminate.reasons(columns, config))["contaminated"].tolist() == [
        True,
        False,
        True,
        True,
        False,
        False,
    ]
    config.decontaminate.enabled = True
    with pytest.raises(ConfigError, match=r"decontaminate\.sets"):
        decontaminate.annotator(config)
    (tmp_path / "set.jsonl").write_text("{broken")
    with pytest.raises(DataError, match=r"set\.jsonl"):
        Decontaminate(str(tmp_path), 13).columns(Documents.of(["x"]))
