import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data.tokenize import train_tokenizer
from models.decoder import Decoder, RopeSpec
from models.hf import load_hf, read_spec, save_hf
from tests.unit.models.builders import random_batch, small_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1},
    "multi-head": {"kv_heads": 4},
    "untied": {"tie_embeddings": False},
    "explicit head_dim": {"head_dim": 16, "dim": 40},
    "linear rope": {"rope": RopeSpec(kind="linear", factor=4.0)},
    "llama3 rope": {"rope": RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 16)},
}


def theirs_from(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def assert_equal_logits(ours: Decoder, theirs: Any) -> None:
    tokens, positions = random_batch(2, 48, ours.spec.vocab_size)
    with torch.no_grad():
        mine, other = ours(tokens, positions), theirs(tokens).logits
    assert ((mine - other).norm() / other.norm()).item() < 1e-5


def hf_folder(folder: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_what_we_write(variant: str, tmp_path: Path):
    model = small_model(**VARIANTS[variant])
    save_hf(model, tmp_path / "hf")
    assert_equal_logits(model, theirs_from(tmp_path / "hf"))
    assert read_spec(tmp_path / "hf") == model.spec
    assert_equal_logits(load_hf(tmp_path / "hf"), theirs_from(tmp_path / "hf"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"head_dim": 20},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1000.0, **LLAMA3}},
    ],
)
def test_we_read_what_transformers_writes(changes: dict[str, Any], tmp_path: Path):
    hf_folder(tmp_path, **changes)
    assert_equal_logits(load_hf(tmp_path), theirs_from(tmp_path))


def test_the_rope_keys_of_transformers_4_are_read(tmp_path: Path):
    hf_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0, "rope_scaling": LLAMA3}))
    assert read_spec(tmp_path).rope == RopeSpec(777.0, "llama3", 8.0, 1.0, 4.0, 16)
    assert_equal_logits(load_hf(tmp_path), theirs_from(tmp_path))


def test_shards_and_their_index_are_written_and_read(tmp_path: Path):
    model = small_model(tie_embeddings=False)
    save_hf(model, tmp_path / "hf", shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == model.spec.parameters() * 4
    assert set(index["weight_map"].values()) == set(files)
    assert_equal_logits(model, theirs_from(tmp_path / "hf"))
    again = load_hf(tmp_path / "hf").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_bf16_weights_are_stored_in_half_the_bytes(tmp_path: Path):
    model = small_model()
    save_hf(model, tmp_path / "a")
    save_hf(model, tmp_path / "b", dtype="bf16")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in "ab"]
    assert sizes[1] < 0.55 * sizes[0]
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_hf(tmp_path / "b")
    assert loaded.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16().float())


def test_a_tied_model_stays_tied(tmp_path: Path):
    save_hf(small_model(), tmp_path / "hf")
    model = load_hf(tmp_path / "hf")
    assert model.head.weight is model.embed.weight
    assert all(p.requires_grad for p in model.parameters())


def test_the_tokenizer_travels_with_the_model(tmp_path: Path):
    train_tokenizer(["the cat sat on the mat, the dog sat on the log"] * 3, 300, tmp_path / "tok")
    (tmp_path / "tok" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    size = FastTokenizer.from_file(str(tmp_path / "tok" / "tokenizer.json")).get_vocab_size()
    save_hf(small_model(vocab_size=size), tmp_path / "hf", tmp_path / "tok")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id
    assert generation["bos_token_id"] == tokenizer.bos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert (tmp_path / "hf" / "chat_template.jinja").is_file()


def test_generation_equals_transformers(tmp_path: Path):
    model = small_model(init_std=0.3)
    save_hf(model, tmp_path / "hf")
    theirs: Any = theirs_from(tmp_path / "hf")
    prompt, _ = random_batch(1, 6)
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = prompt
    with torch.no_grad():
        while tokens.shape[1] < expected.shape[1]:
            logits = model(tokens, torch.arange(tokens.shape[1])[None])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert tokens.tolist() == expected.tolist()


def test_an_earlier_model_is_replaced_and_nothing_is_left_beside(tmp_path: Path):
    save_hf(small_model(seed=1), tmp_path / "hf", shard_bytes=20_000)
    (tmp_path / ".hf.123.tmp").mkdir()
    second = small_model(seed=2)
    save_hf(second, tmp_path / "hf")
    assert torch.equal(load_hf(tmp_path / "hf").embed.weight, second.embed.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert not list((tmp_path / "hf").glob("model-*"))


RELATIVES: dict[str, tuple[type, type]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_llama_are_read_and_written_back(name: str, tmp_path: Path):
    config, model = RELATIVES[name]
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": None}
    theirs: Any = model(config(**sizes, **heads, initializer_range=0.2)).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if key.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # which start at 0 and 1
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    assert_equal_logits(ours, theirs)
    assert ours.spec.parameters() == sum(p.numel() for p in ours.parameters())
    save_hf(ours, tmp_path / "ours")
    assert_equal_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval())
