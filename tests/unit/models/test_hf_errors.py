import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import ConfigError, DataError
from data.tokenize import train_tokenizer
from models import hf
from models.hf import load_hf, read_spec, save_hf
from tests.unit.models.builders import small_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_hf(small_model(), tmp_path / "hf")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, added: dict[str, torch.Tensor], drop: str = "") -> None:
    path = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name != drop}
    save_file(tensors | added, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 0}, "layers"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ],
)
def test_foreign_configs_are_refused_by_the_name_of_the_key(folder: Path, changes: dict[str, Any], named: str):
    edit_config(folder, **changes)
    with pytest.raises(DataError, match=named):
        load_hf(folder)


def test_no_config(tmp_path: Path):
    with pytest.raises(DataError, match=r"config\.json"):
        read_spec(tmp_path)
    with pytest.raises(DataError, match=r"config\.json"):
        read_spec(tmp_path / "absent")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_config(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        load_hf(folder)


def test_missing_tensor(folder: Path):
    edit_weights(folder, {}, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight = missing"):
        load_hf(folder)


def test_unknown_tensor(folder: Path):
    edit_weights(folder, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
    with pytest.raises(DataError, match=r"q_proj\.bias"):
        load_hf(folder)


def test_obsolete_buffers_are_ignored(folder: Path):
    edit_weights(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    assert load_hf(folder).spec == read_spec(folder)


def test_wrong_shape(folder: Path):
    edit_config(folder, intermediate_size=81)
    with pytest.raises(DataError, match=r"\[48, 81\]"):
        load_hf(folder)


def test_quantised_weights(folder: Path):
    edit_weights(folder, {"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    with pytest.raises(DataError, match="I8"):
        load_hf(folder)


def test_a_tied_head_must_be_the_embedding(folder: Path):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, {"lm_head.weight": embedding})
    assert load_hf(folder).spec.tie_embeddings
    edit_weights(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        load_hf(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_hf(folder)


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["absent.safetensors", "../hf/model.safetensors", "/etc/passwd"])
def test_the_index_names_files_of_its_own_folder(folder: Path, name: str):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(DataError, match=name):
        load_hf(folder)


def test_a_missing_shard(tmp_path: Path):
    folder = save_hf(small_model(), tmp_path / "hf", shard_bytes=20_000)
    (folder / sorted(folder.glob("model-00002*"))[0].name).unlink()
    with pytest.raises(DataError, match="model-00002"):
        load_hf(folder)


def test_a_tokenizer_with_more_ids_than_the_embedding(folder: Path, tmp_path: Path):
    train_tokenizer(["some text"], 300, tmp_path / "tok")
    with pytest.raises(DataError, match="tokenizer"):
        save_hf(small_model(), tmp_path / "other", tmp_path / "tok")
    assert not (tmp_path / "other").exists()
    (folder / "tokenizer.json").write_bytes((tmp_path / "tok" / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="tokenizer"):
        load_hf(folder)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(DataError, match="model folder"):
        save_hf(small_model(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all my work"


def test_an_unknown_dtype(tmp_path: Path):
    with pytest.raises(ConfigError, match="fp8"):
        save_hf(small_model(), tmp_path / "hf", dtype="fp8")


def test_a_failed_save_leaves_the_earlier_model(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = load_hf(folder).embed.weight.clone()

    def fail(*_: object, **__: object) -> None:
        raise hf.SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')

    monkeypatch.setattr(hf, "save_file", fail)
    with pytest.raises(hf.SundogError, match=r"(?s)resource error.*No space left"):
        save_hf(small_model(seed=3), folder)
    assert torch.equal(load_hf(folder).embed.weight, before)
    assert [p.name for p in folder.parent.iterdir()] == ["hf"]
