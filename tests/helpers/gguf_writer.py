"""Write a GGUF file from one of this project's Llama folders, with the file format's own library."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from data.tokenize import load_tokenizer
from models.hf import read_spec
from models.spec import ModelSpec


def write_gguf(folder: Path, path: Path, quantisation: str = "F32") -> Path:
    """All weights of a folder, matrices in the given type of the format."""
    path.parent.mkdir(exist_ok=True)
    spec, tokenizer = read_spec(folder), load_tokenizer(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.dim)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.ffn_dim)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    vocabulary = sorted(tokenizer.fast.get_vocab().items(), key=lambda item: item[1])
    merges = [" ".join(pair) for pair in _merges(folder)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index in (tokenizer.eos_id, tokenizer.pad_id) else 1 for _, index in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in hf.state_dict().items():
        if name != "lm_head.weight":
            weight = _gguf_layout(name, tensor.numpy(), spec)
            kind = gguf.GGMLQuantizationType.F32 if weight.ndim < 2 else gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(folder: Path) -> list[list[str]]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]


def _gguf_name(name: str) -> str:
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    parts |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def _gguf_layout(name: str, weight: np.ndarray[Any, Any], spec: ModelSpec) -> np.ndarray[Any, Any]:
    """GGUF stores the rotated halves of a head interleaved."""
    heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
