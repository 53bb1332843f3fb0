"""Images in documents: read, broken ones skipped, curated, packed whole beside the text that surrounds them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conf.errors import ConfigError, DataError
from conf.rules import check
from conf.schema import RunConfig
from data.corpora import open_corpus, read_slice
from data.curate import curate
from data.documents import Document, Skip
from data.images import MARK, BadImage, attach, grid, interleave, mark_of, name_of, open_image, pixels_of, png
from data.loader import Loader
from data.order import order
from data.pack import pack
from data.readers import read_file
from data.shards import open_shards
from data.stages import serial_units, stage_folders
from data.tokenize import load_tokenizer
from models.image_tokenizer import VectorQuantised, load_image_tokenizer, save_image_tokenizer
from tests.unit.data.samples import make_config
from tests.unit.models.images import SPEC


def picture(seed: int, height: int = 8, width: int = 8, mode: str = "L", form: str = "PNG") -> bytes:
    """A file with random pixels, a bright and a dark half."""
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    array = rng.integers(0, 20, (height, width, bands), dtype=np.uint8)
    array[:, : width // 2] += np.uint8(230 * (seed % 2))
    array[: height // 2] += np.uint8(200 * (1 - seed % 2))
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if bands == 1 else array, mode).save(buffer, format=form)
    return buffer.getvalue()


def skipped(path: Path) -> list[tuple[str, str]]:
    found = list(read_file(str(path), path.name, "auto", image_field="images"))
    return [(skip.id, skip.reason) for skip in found if isinstance(skip, Skip)]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (3, 200), (77, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_and_mode_become_squares(mode: str, height: int, width: int, channels: int) -> None:
    pixels = pixels_of(picture(1, height, width, mode), 16, channels)
    assert pixels.shape == (16, 16, channels)
    assert pixels.dtype == np.uint8


def test_an_image_of_the_right_size_is_kept_as_it_is_and_transparency_is_black() -> None:
    array = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    assert np.array_equal(pixels_of(png(array), 8, 1), array)
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(buffer, format="PNG")
    assert not pixels_of(buffer.getvalue(), 8, 3).any()


def test_the_middle_of_a_long_image_is_kept() -> None:
    array = np.zeros((8, 24, 1), dtype=np.uint8)
    array[:, 8:16] = 200
    assert (pixels_of(png(array), 8, 1) > 150).mean() > 0.9


def test_broken_files_and_bombs_are_bad_images(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture(2, 40, 40, form="JPEG")
    for content in (b"", b"no image", whole[: len(whole) // 2], picture(2)[:-30]):
        with pytest.raises(BadImage):
            open_image(content)
    monkeypatch.setattr("data.images.MAX_PIXELS", 63)
    with pytest.raises(BadImage, match="8 x 8 pixels"):
        open_image(picture(2))


def test_places_in_the_text_are_filled_in_order() -> None:
    one, two = picture(1), picture(2)
    document = attach(Document("d", "a <|image|> b <|image|>"), [one, two])
    assert document.text == f"a {mark_of(one)} b {mark_of(two)}"
    assert (document.modality, document.images) == ("text+image", (one, two))
    assert attach(Document("d", "a"), [two]).text == mark_of(two) + "a"
    assert attach(Document("d", "a <|image|>"), []).modality == "text"
    with pytest.raises(BadImage, match="1 places for 2 images"):
        attach(Document("d", "a <|image|>"), [one, two])


def test_records_hold_images_as_paths_data_urls_and_bytes(tmp_path: Path) -> None:
    one, two = picture(1), picture(2)
    (tmp_path / "one.png").write_bytes(one)
    url = "data:image/png;base64," + base64.b64encode(two).decode()
    rows = [{"text": "t <|image|>", "images": [image]} for image in ("one.png", url, str(tmp_path / "one.png"))]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"text": ["t <|image|>"] * 2, "images": [[{"bytes": one, "path": "x"}], [{"bytes": two, "path": None}]]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    for name, expected in (("c.jsonl", [one, two, one]), ("c.parquet", [one, two])):
        found = list(read_file(str(tmp_path / name), name, "auto", image_field="images"))
        assert [d.images for d in found if isinstance(d, Document)] == [(image,) for image in expected]
    plain = next(iter(read_file(str(tmp_path / "c.jsonl"), "c.jsonl", "auto")))
    assert isinstance(plain, Document)
    assert (plain.text, plain.images) == ("t <|image|>", ())
    assert json.loads(plain.metadata) == {"images": ["one.png"]}


def test_documents_with_images_that_cannot_be_read_are_counted_skips(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(picture(1)[:-30])
    bad: list[Any] = ["gone.png", "torn.png", "data:image/png;base64,###", 7, {"bytes": None, "path": None}]
    rows = [{"text": "t", "images": [image]} for image in bad] + [{"text": "<|image|><|image|>", "images": []}]
    rows += [{"text": "<|image|><|image|>", "images": ["data:," + base64.b64encode(picture(1)).decode()]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [(f"c.jsonl:{n}", "broken_image") for n in range(1, 6)] + [("c.jsonl:7", "image_count")]
    assert skipped(tmp_path / "c.jsonl") == expected


def corpus(root: Path, documents: int = 24) -> Path:
    """Interleaved documents of prose and up to three images, some of text alone."""
    rows = []
    for n in range(documents):
        images = ["data:," + base64.b64encode(picture(10 * n + i)).decode() for i in range(n % 4)]
        text = f"Note {n} on rivers. " * 3 + "".join(f"Figure {i} of {n}: <|image|> there. " for i in range(n % 4))
        rows.append({"id": f"d{n}", "text": text, "images": images})
    (root / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "c.jsonl"


def prepared(root: Path, **data: Any) -> RunConfig:
    """A config of the corpus, curated and ordered, with an image tokenizer that has learnt nothing."""
    config = make_config(root, corpus(root), image_field="images", image_tokenizer=str(root / "images"), **data)
    config.curation.min_chars, config.order.kind = 0, "random"
    config.curation.max_repeated_line_fraction = 1.0
    save_image_tokenizer(VectorQuantised(SPEC).initialise(1), root / "images")
    curate(config, serial_units)
    order(config, serial_units)
    return config


@pytest.mark.parametrize(("context", "packing"), [(40, "concat"), (40, "soft"), (64, "whole"), (18, "concat")])
def test_windows_hold_images_whole_and_as_they_were(tmp_path: Path, context: int, packing: str) -> None:
    config = prepared(tmp_path, context=context, packing=packing)
    figures = pack(config, serial_units).figures
    folders = stage_folders(config)
    shards, tokenizer = open_shards(folders.packed), load_tokenizer(folders.tokenizer)
    ids = tokenizer.images
    assert ids is not None
    assert (ids.codes, ids.first + ids.codes) == (SPEC.codes, shards.vocab_size)
    tokens, documents = shards.windows(np.arange(len(shards)))
    found, texts = [], {}
    for window, owners in zip(tokens.tolist(), documents.tolist(), strict=True):
        begins = [place for place, token in enumerate(window) if token == ids.begin]
        assert [window[place + SPEC.tokens + 1] for place in begins] == [ids.end] * len(begins), "no image is cut"
        found += [tuple(window[place + 1 : place + SPEC.tokens + 1]) for place in begins]
        for token, owner in zip(window, owners, strict=True):
            texts.setdefault(owner, []).append(token)
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    images = [base64.b64decode(url[6:]) for row in rows for url in row["images"]]
    codes = load_image_tokenizer(tmp_path / "images").encode(np.stack([pixels_of(i, SPEC.size, 1) for i in images]))
    assert sorted(found) == sorted(tuple(int(c) + ids.first for c in row) for row in codes)
    texts.pop(-1, None)
    said = sorted(tokenizer.decode(owned) for owned in texts.values())
    assert said == sorted(row["text"].replace("<|image|>", "") for row in rows), "the text around them is kept"
    assert figures["documents"] == len(rows)
    batch = Loader(shards, 2, 0, "document", 0.1).batch(0, 0, 1)
    assert batch.tokens.shape == (2, context)


def test_an_image_that_fits_in_no_window_is_an_error(tmp_path: Path) -> None:
    config = prepared(tmp_path, context=17)
    with pytest.raises(DataError) as raised:
        pack(config, serial_units)
    assert raised.value.field == "data.context"
    assert "data.context=18" in str(raised.value)


def test_pack_says_how_to_get_an_image_tokenizer(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    config.data.image_tokenizer = str(tmp_path / "gone")
    with pytest.raises(DataError, match="trainer=image_tokenizer"):
        pack(config, serial_units)
    config.data.image_tokenizer = ""
    with pytest.raises(ConfigError, match=r"data\.image_tokenizer"):
        check(config)


def test_another_image_tokenizer_is_another_corpus(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    before = pack(config, serial_units).fingerprint
    assert pack(config, serial_units).fingerprint == before
    save_image_tokenizer(VectorQuantised(SPEC).initialise(2), tmp_path / "images")
    with pytest.raises(DataError, match=r"data\.overwrite=true"):
        pack(config, serial_units)
    digest = load_tokenizer(stage_folders(config).tokenizer).digest
    config.data.overwrite = True
    assert pack(config, serial_units).fingerprint != before
    assert load_tokenizer(stage_folders(config).tokenizer).digest != digest, "its ids mean other images"


def test_a_tokenizer_that_came_with_its_images_is_used_again(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    pack(config, serial_units)
    given = stage_folders(config).tokenizer
    config.data.tokenizer, config.data.image_tokenizer = str(given), str(given / "image_tokenizer")
    config.data.dir = str(tmp_path / "again")
    curate(config, serial_units)
    order(config, serial_units)
    pack(config, serial_units)
    again = stage_folders(config).tokenizer
    assert (again / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    assert load_tokenizer(again).digest == load_tokenizer(given).digest
    save_image_tokenizer(VectorQuantised(SPEC).initialise(2), tmp_path / "other")
    config.data.image_tokenizer, config.data.dir = str(tmp_path / "other"), str(tmp_path / "third")
    curate(config, serial_units)
    order(config, serial_units)
    with pytest.raises(DataError, match="other images"):
        pack(config, serial_units)


def test_the_same_text_with_other_images_is_no_duplicate(tmp_path: Path) -> None:
    urls = ["data:," + base64.b64encode(picture(n)).decode() for n in (1, 2, 1)]
    lines = [json.dumps({"text": "A figure: <|image|>", "images": [url]}) + "\n" for url in urls]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    config = make_config(tmp_path, tmp_path / "c.jsonl", image_field="images", image_tokenizer="x")
    config.curation.min_chars = 0
    manifest = curate(config, serial_units)
    assert (manifest.figures["kept"], manifest.figures["dropped"]) == (2, {"duplicate_text": 1})
    kept = pq.read_table(stage_folders(config).curated / manifest.figures["parts"][0]["file"])
    assert [[name_of(i) for i in row] for row in kept.column("images").to_pylist()] == [
        MARK.findall(text) for text in kept.column("text").to_pylist()
    ]


def test_a_mark_without_its_image_is_text(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    pack(config, serial_units)
    tokenizer = load_tokenizer(stage_folders(config).tokenizer)
    assert tokenizer.images is not None
    mark, codes = mark_of(b"x"), np.arange(SPEC.tokens)
    [tokens] = interleave(tokenizer, [f"a{mark}b"], {name_of(b"y"): codes})
    assert tokenizer.decode(tokens) == f"a{mark}b"
    [tokens] = interleave(tokenizer, [f"a{mark}{mark}b"], {name_of(b"x"): codes})
    assert tokens.count(tokenizer.images.begin) == 2
    assert tokenizer.decode(tokens) == "ab"
    assert tokenizer.images.begin not in tokenizer.encode("<|image_begin|>"), "text cannot begin an image"


def test_the_default_corpus_has_every_digit_once_and_half_its_tokens_are_images(tmp_path: Path) -> None:
    config = make_config(tmp_path, "", source="digit_docs", path="", image_tokenizer="x", shard_documents=700)
    slices = open_corpus(config.data).slices
    assert len(slices) > 2
    first = [record for record in read_slice(slices[0].unit) if isinstance(record, Document)]
    again = [record for record in read_slice(slices[0].unit) if isinstance(record, Document)]
    assert first == again
    assert len(first) == 700
    images = [image for document in first for image in document.images]
    assert len(set(images)) == len(images), "each image once"
    assert all(2 <= len(document.images) <= 3 for document in first)
    assert pixels_of(images[0], 28, 1).any()
    captions = " ".join(MARK.sub("", document.text) for document in first)
    assert all(captions.count(f"digit {name}") > 100 for name in ("zero", "nine"))


def test_a_grid_has_all_images() -> None:
    images = [np.full((4, 4, 1), n, dtype=np.uint8) for n in range(5)]
    sheet = grid(images, 3, gap=1)
    assert sheet.shape == (9, 14, 1)
    assert [sheet[5 * (n // 3), 5 * (n % 3), 0] for n in range(5)] == list(range(5))
