"""Losses against a loop over documents in fp64, whatever the packing; the cache; models of transformers and GGUF."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from conf.errors import ConfigError, DataError
from data.files import digest_json, write_atomic
from data.preselect.ladder import model_digest
from data.tokenize import load_tokenizer, train_tokenizer
from inference import losses
from inference.loss_models import DecoderModel, TransformersModel, _token_bits, load_loss_model
from inference.loss_rows import OnePassNorm, OnePassRotation, sum_exponentials
from inference.losses import COLUMNS, inspect_unit, losses_unit, resident, score_texts
from inference.windows import Window, WindowRule, cut, pack, text_key
from models.decoder import Decoder, ModelSpec, RopeSpec
from models.hf import save_hf
from models.norm import RMSNorm
from models.rope import rotation
from tests.helpers.gguf_writer import write_gguf

WORDS = ["the", "moon", "pulls", "water", "along", "a", "coast", "twice", "every", "day", "while", "bread", "rises"]
RULE = WindowRule(48, 24)


def documents(count: int = 24, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    lengths = [1, 2, 3, 50, 120, *random.integers(4, 60, count - 5).tolist()]
    return [" ".join(WORDS[i] for i in random.integers(0, len(WORDS), length)) for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with weights large enough to have opinions, as `sundog export` writes it."""
    place = tmp_path_factory.mktemp("model")
    train_tokenizer(documents(200), 300, place / "tokenizer")
    size = load_tokenizer(place / "tokenizer").vocab_size
    spec = ModelSpec(size, 32, 2, 4, 2, 8, 64, context=48, init_std=0.3)
    return save_hf(Decoder(spec).initialise(0), place / "hf", place / "tokenizer")


@functools.cache
def reference(folder: Path) -> tuple[Any, Any]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def one_at_a_time(folder: Path, text: str, rule: WindowRule) -> list[float]:
    """Bits of each token: transformers in fp64, one document, one window at a time."""
    model, tokenizer = reference(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    bits: list[float] = []
    while len(bits) < len(ids) - 1:
        end = min(len(ids), rule.window + 1 if not bits else len(bits) + 1 + rule.stride)
        seen = torch.tensor([ids[max(0, end - rule.window - 1) : end]])
        with torch.no_grad():
            logits = model(seen[:, :-1]).logits[0]
        all_bits = -torch.log_softmax(logits, -1).gather(1, seen[0, 1:, None])[:, 0] / math.log(2)
        bits += all_bits[len(all_bits) - (end - 1 - len(bits)) :].tolist()
    return bits


def test_equal_to_a_loop_over_documents_in_fp64(folder: Path) -> None:
    texts = documents(12)
    found = score_texts(load_loss_model(folder), texts, RULE)
    for index, text in enumerate(texts):
        expected = one_at_a_time(folder, text, RULE)
        assert found.tokens[index] == len(expected)
        assert found.bits[index] / len(text) == pytest.approx(sum(expected) / len(text), abs=1e-4)
        assert found.even_bits[index] == pytest.approx(sum(expected[::2]), rel=1e-5)
        assert found.even_tokens[index] == len(expected[::2])
        assert found.square_bits[index] == pytest.approx(sum(b * b for b in expected), rel=1e-5)


def test_order_packing_and_company_change_nothing(folder: Path) -> None:
    texts, model = documents(), DecoderModel(folder, torch.float64)
    base = score_texts(model, texts, RULE).bits
    for row_tokens in (1, 60, 333):
        np.testing.assert_allclose(score_texts(model, texts, RULE, row_tokens).bits, base, rtol=1e-12)
    turn = np.random.default_rng(1).permutation(len(texts))
    np.testing.assert_allclose(score_texts(model, [texts[i] for i in turn], RULE).bits, base[turn], rtol=1e-12)
    np.testing.assert_allclose(score_texts(model, texts[3:5], RULE).bits, base[3:5], rtol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "begin"), [(0, 1), (1, 1), (7, 1), (8, 1), (9, 1), (30, 1), (1, 0), (9, 0), (30, 2)]
)
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_is_scored_once_with_enough_before_it(tokens: int, begin: int, stride: int) -> None:
    rule, text = WindowRule(8, stride), list(range(100, 100 + tokens))
    windows = list(cut(0, text, [0] * begin, rule))
    scored = [token for window in windows for token in window.tokens[len(window.tokens) - window.scored :]]
    assert scored == (text if begin else text[1:])
    assert all(2 <= len(window.tokens) <= 9 for window in windows)
    assert all(window.scored <= stride and len(window.tokens) == 9 for window in windows[1:])


def test_rows_hold_every_window_once_and_keep_their_bound() -> None:
    lengths = np.random.default_rng(0).integers(2, 50, 200).tolist()
    windows = [Window(0, [0] * length, 1) for length in lengths]
    rows = list(pack(windows, 100))
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert all(sum(lengths[index] - 1 for index in row) <= 100 for row in rows)
    assert list(pack(windows[:1], 1)) == [[0]]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_impossible_windows_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ConfigError):
        WindowRule(window, stride)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_and_rotations_in_one_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    norm = RMSNorm(24, 1e-5).to(dtype)
    norm.weight.data.normal_()
    for shape in ((1, 0, 24), (1, 7, 24), (1, 5, 3, 24)):
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(OnePassNorm(norm)(x), norm(x).detach(), rtol=tolerance, atol=tolerance)
    turn = rotation(torch.arange(9)[None], 12, RopeSpec())
    x = torch.randn(1, 9, 2, 12, dtype=dtype)
    one_pass = OnePassRotation(turn.cos, turn.sin).apply(x)
    torch.testing.assert_close(one_pass, turn.apply(x), rtol=1e-6, atol=1e-6)


def test_bits_with_and_without_the_largest_logit() -> None:
    torch.manual_seed(0)
    logits, targets = 15 * torch.randn(20, 300), torch.arange(20)
    expected = -torch.log_softmax(logits.double(), 1).gather(1, targets[:, None])[:, 0] / math.log(2)
    for most in (60.0, math.inf):
        torch.testing.assert_close(_token_bits(logits.clone(), targets, most), expected, rtol=0, atol=2e-5)
    large = 1000 * torch.randn(20, 300)
    assert _token_bits(large, targets).isfinite().all()


@pytest.mark.parametrize(("spread", "columns"), [(1.0, 7), (20.0, 1024), (26.0, 3001)])
def test_sums_of_exponentials(spread: float, columns: int) -> None:
    torch.manual_seed(columns)
    x = (spread * torch.randn(9, columns)).clamp_(-80, 80)
    x[0, 0], x[1, 0] = 80.0, -80.0
    expected = x.double().exp().sum(1)
    torch.testing.assert_close(sum_exponentials(x), expected, rtol=1e-6, atol=0)


def test_a_text_without_tokens_has_no_loss(folder: Path) -> None:
    found = score_texts(load_loss_model(folder), ["", "moon", ""], RULE)
    assert np.isnan(found.bits).tolist() == [True, False, True]
    assert found.tokens.tolist() == [0, found.tokens[1], 0]


def test_special_tokens_in_a_text_are_text(folder: Path) -> None:
    found = score_texts(load_loss_model(folder), ["a<|endoftext|>b"], RULE)
    assert found.tokens[0] > 3


# Other architectures


def other_model(kind: str, folder: Path, source: Path) -> Path:
    """A random model of another architecture with the tokenizer of ``source``."""
    vocabulary = load_tokenizer(source).vocab_size
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "gpt_neox":
        config: Any = transformers.GPTNeoXConfig(**sizes, num_attention_heads=4, intermediate_size=64)
        config.max_position_embeddings = 64
    else:
        config = transformers.MambaConfig(**sizes, state_size=4)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_atomic(folder / name, (source / name).read_bytes())
    return folder


@pytest.mark.parametrize(("kind", "packs"), [("gpt_neox", True), ("mamba", False)])
def test_other_architectures_through_transformers(folder: Path, tmp_path: Path, kind: str, packs: bool) -> None:
    model = load_loss_model(other_model(kind, tmp_path / kind, folder))
    assert isinstance(model, TransformersModel)
    assert model.packs is packs  # a recurrent model would carry its state into the next document
    texts = documents(9)
    found = score_texts(model, texts, RULE)
    for index, text in enumerate(texts):
        expected = one_at_a_time(tmp_path / kind, text, RULE)
        assert found.bits[index] / len(text) == pytest.approx(sum(expected) / len(text), abs=1e-4)


def test_gguf_has_the_losses_of_the_folder_that_it_was_made_from(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(folder, tmp_path / "model.gguf")
    texts = documents(9)
    found = score_texts(load_loss_model(path), texts, RULE)
    expected = score_texts(load_loss_model(folder), texts, RULE)
    np.testing.assert_allclose(found.bits, expected.bits, rtol=1e-4)


# Units and the cache


def work(folder: Path, place: Path, part: str = "part-0.parquet", **changes: Any) -> dict[str, Any]:
    return {
        "sample": str(place / "sample"), "part": part, "model": str(folder), "digest": model_digest(folder),
        "cache": str(place / "cache"), "folder": str(place / "losses"), "file": f"m-{part}",
        "marker": str(place / f"losses/markers/{part}.json"), "fingerprint": digest_json(part),
        "window": 48, "stride": 24, "row_tokens": 512,
    } | changes  # fmt: skip


def write_part(place: Path, texts: list[str], part: str = "part-0.parquet") -> None:
    (place / "sample").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), place / "sample" / part)


def test_a_text_is_scored_once_by_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(12)
    write_part(tmp_path, texts[:8] + texts[:2])
    write_part(tmp_path, texts[4:], "part-1.parquet")
    first = losses_unit(work(folder, tmp_path))
    assert (first["scored"], first["documents"]) == (8, 10)
    second = losses_unit(work(folder, tmp_path, "part-1.parquet"))
    assert (second["scored"], second["documents"]) == (4, 8)
    stored = pq.read_table(tmp_path / "losses/m-part-1.parquet")
    assert stored["text_key"].to_pylist() == [text_key(text) for text in texts[4:]]
    found = score_texts(resident(str(folder), model_digest(folder)), texts[4:], RULE)
    for name in COLUMNS:
        np.testing.assert_allclose(stored[name].to_numpy(), getattr(found, name), rtol=1e-5)

    def never(*_: Any) -> None:
        raise AssertionError("loaded a model although every loss is known")

    monkeypatch.setattr(losses, "resident", never)
    assert losses_unit(work(folder, tmp_path)) == first  # its marker answers
    again = losses_unit(work(folder, tmp_path, marker=str(tmp_path / "other.json"), fingerprint="e" * 40))
    assert again["scored"] == 0
    with pytest.raises(AssertionError, match="loaded a model"):  # another window is another loss
        losses_unit(work(folder, tmp_path, stride=12, marker=str(tmp_path / "third.json")))


def test_an_empty_part_and_a_damaged_cache(folder: Path, tmp_path: Path) -> None:
    write_part(tmp_path, [])
    assert losses_unit(work(folder, tmp_path))["documents"] == 0
    write_part(tmp_path, ["moon"], "part-1.parquet")
    losses_unit(work(folder, tmp_path, "part-1.parquet"))
    next((tmp_path / "cache").rglob("*.parquet")).write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="remove this folder"):
        losses_unit(work(folder, tmp_path, "part-1.parquet", marker=str(tmp_path / "other.json")))


def test_a_model_that_does_not_load_says_so(folder: Path, tmp_path: Path) -> None:
    good = inspect_unit({"model": str(folder), "digest": model_digest(folder)})
    assert (good["context"], good["failed"]) == (48, "")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        write_atomic(broken / name, (folder / name).read_bytes())
    assert "model.safetensors" in inspect_unit({"model": str(broken), "digest": "x"})["failed"]
    write_atomic(broken / "config.json", '{"model_type": "nothing", "architectures": ["Nothing"]}')
    assert "transformers" in inspect_unit({"model": str(broken), "digest": "y"})["failed"]
    assert "not there" in inspect_unit({"model": str(tmp_path / "gone"), "digest": "z"})["failed"]
