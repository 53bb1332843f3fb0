"""Names of the weights here and in model folders; shapes and layouts are equal, so mapping is renaming.

Dense layers have the names of a LlamaForCausalLM, which its relatives use too; routers and experts those that follow
from it.
"""

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
EXPERTS = {"gate_up": "gate_up_proj", "down": "down_proj"}
AUXILIARY = ("auxiliary.hidden.weight", "auxiliary.out.weight", "auxiliary_threshold")
EXACT = ("threshold", ".steps", ".bias")  # ends of the names of router state that is stored in fp32 always
OBSOLETE_SUFFIX = ".rotary_emb.inv_freq"  # buffers that old transformers versions stored


def hf_names(spec: ModelSpec) -> dict[str, str]:
    """Own name -> Hugging Face name, in the order of the model; a tied head has none."""
    names = {"embed.weight": OUTSIDE["embed.weight"]}
    for layer in range(spec.layers):
        dense = not spec.experts.groups
        plain = {ours: hf for ours, hf in BLOCK.items() if dense or not ours.startswith("mlp.")}
        names |= {f"layers.{layer}.{ours}.weight": f"model.layers.{layer}.{hf}.weight" for ours, hf in plain.items()}
        further = _routed(spec, layer) | _attention(spec)
        names |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{hf}" for ours, hf in further.items()}
    names["norm.weight"] = OUTSIDE["norm.weight"]
    if not spec.tie_embeddings:
        names[HEAD] = HF_HEAD
    return names


def _attention(spec: ModelSpec) -> dict[str, str]:
    """What Qwen2 and Qwen3 have beyond a Llama."""
    names = {f"attention.{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv" if spec.qkv_bias}
    return names | {f"attention.{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk" if spec.qk_norm}


def _routed(spec: ModelSpec, layer: int) -> dict[str, str]:
    """Experts and routers of one layer."""
    groups, names = spec.experts.groups, {}
    if groups:
        for group in spec.expert_groups:
            for ours, hf in EXPERTS.items():
                names[f"mlp.experts.{group}.{ours}"] = f"mlp.experts.{group}.{hf}"
        if max(groups) > 1:
            state = ("bias",) if spec.experts.routing == "token_choice" else ("threshold", "steps")
            names |= {f"mlp.router.{name}": f"mlp.router.{name}" for name in _router(spec, state)}
    if spec.depth < 1 and layer % 2 == 0:
        names |= {f"depth_router.{name}": f"depth_router.{name}" for name in _router(spec, ("threshold", "steps"))}
    return names


def _router(spec: ModelSpec, state: tuple[str, ...]) -> tuple[str, ...]:
    return ("weight", *state, *(AUXILIARY if spec.experts.causal == "auxiliary" else ()))
