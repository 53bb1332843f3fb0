"""Embedders that read a model's folder: against plain loops, end to end, and with bad models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from conf.errors import ConfigError, DataError
from conf.schema import RunConfig
from data.curate import curate
from data.documents import read_texts
from data.embed import embed
from data.embedders.static import SIF, load_table
from data.order import order
from data.stages import serial_units, stage_folders
from data.tokenize import train_tokenizer
from data.vectors import load_vectors
from inference.embeddings import encode
from tests.unit.data.samples import TOPICS, make_config, text, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([text(topic, 3) for topic in TOPICS], 320, folder)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    return folder


def embedded(root: Path, folder: Path, kind: str) -> tuple[RunConfig, Any, list[str], np.ndarray[Any, Any]]:
    """The embedding of a small corpus: config, manifest, texts and vectors."""
    config = make_config(root, write_jsonl(root / "c.jsonl", 30))
    config.order.embedder, config.order.model = kind, str(folder)
    curated = curate(config, serial_units)
    manifest = embed(config, serial_units)
    folders = stage_folders(config)
    texts = [t for part in curated.figures["parts"] for t in read_texts(folders.curated / part["file"])]
    return config, manifest, texts, load_vectors(folders.embedded, manifest.figures["parts"])


def centred(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    moved = raw - raw.mean(axis=0)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def test_transformer_against_one_text_at_a_time(tmp_path: Path, model: Path) -> None:
    config, manifest, texts, vectors = embedded(tmp_path, model, "transformer")
    bert, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    raw = []
    with torch.no_grad():
        for one in texts:
            ids = torch.tensor([tokenizer(one)["input_ids"][:48]])
            raw.append(bert(input_ids=ids).last_hidden_state[0].double().mean(0).numpy())
    np.testing.assert_allclose(vectors, centred(np.array(raw)), atol=2e-4)
    assert manifest.figures["dimensions"] == 24
    assert order(config, serial_units).figures["isolated"] == 0
    assert embed(config, serial_units).reused


def test_pooling_lengths_and_empty_texts(model: Path) -> None:
    bert, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    texts = ["one", "", "bread ovens " * 40, "night"]
    for pooling in ("mean", "first"):
        together = encode(bert, tokenizer, texts, 16, pooling)
        alone = np.concatenate([encode(bert, tokenizer, [one], 16, pooling) for one in texts])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert together[0].any()
        assert not together[1].any()


def test_static_against_a_plain_loop(tmp_path: Path, model: Path) -> None:
    config, manifest, texts, vectors = embedded(tmp_path, model, "static")
    tokenizer, table = Tokenizer.from_file(str(model / "tokenizer.json")), load_table(model).astype(np.float64)
    ids = [tokenizer.encode(one, add_special_tokens=False).ids for one in texts]
    counts = np.bincount([i for row in ids for i in row], minlength=len(table))
    weight = SIF / (SIF + counts / counts.sum())
    raw = np.array([sum(weight[i] * table[i] for i in row) / sum(weight[i] for i in row) for row in ids])
    np.testing.assert_allclose(vectors, centred(raw), atol=1e-4)
    assert manifest.figures["dimensions"] == 24
    assert order(config, serial_units).figures["adjacent_similarity"] > 0.3


def test_vectors_that_are_no_numbers_belong_to_documents_without_neighbours(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train_tokenizer([text(topic, 3) for topic in TOPICS], 320, folder)
    table = np.random.default_rng(0).normal(size=(320, 8)).astype(np.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [{i for n in range(30) for i in tokenizer.encode(text(topic, n)).ids} for topic in TOPICS]
    table[min(tokens[1] - set.union(tokens[0], *tokens[2:]))] = np.nan  # and with it documents of one topic
    save_file({"embeddings": table}, folder / "model.safetensors")
    config, _, texts, vectors = embedded(tmp_path, folder, "static")
    lost = ~vectors.any(axis=1)
    assert np.isfinite(vectors).all()
    assert 0 < lost.sum() < len(texts)
    assert order(config, serial_units).figures["isolated"] == lost.sum()
    assert order(config, serial_units).figures["documents"] == len(texts)


@pytest.mark.parametrize(("kind", "folder"), [("static", ""), ("transformer", ""), ("tfidf", "somewhere")])
def test_a_model_where_there_must_be_one(tmp_path: Path, kind: str, folder: str) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 5))
    curate(config, serial_units)
    config.order.embedder, config.order.model = kind, folder
    with pytest.raises(ConfigError, match=r"order\.model"):
        embed(config, serial_units)


@pytest.mark.parametrize("kind", ["static", "transformer"])
def test_a_model_that_is_none(tmp_path: Path, kind: str) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 5))
    curate(config, serial_units)
    (tmp_path / "empty").mkdir()
    config.order.embedder, config.order.model = kind, str(tmp_path / "empty")
    with pytest.raises(DataError, match="empty"):
        embed(config, serial_units)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "empty" / name).write_text("{}")
    with pytest.raises(DataError, match="empty"):
        embed(config, serial_units)
