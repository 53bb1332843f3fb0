"""Names of the weights here and in a LlamaForCausalLM; shapes and layouts are equal, so mapping is renaming."""

from models.spec import ModelSpec

OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
HEAD, HF_HEAD = "head.weight", "lm_head.weight"
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
OBSOLETE_SUFFIX = ".rotary_emb.inv_freq"  # buffers that old transformers versions stored


def hf_names(spec: ModelSpec) -> dict[str, str]:
    """Own name -> Hugging Face name, in the order of the model; a tied head has none."""
    names = {"embed.weight": OUTSIDE["embed.weight"]}
    for layer in range(spec.layers):
        names |= {f"layers.{layer}.{ours}.weight": f"model.layers.{layer}.{hf}.weight" for ours, hf in BLOCK.items()}
    names["norm.weight"] = OUTSIDE["norm.weight"]
    if not spec.tie_embeddings:
        names[HEAD] = HF_HEAD
    return names
