"""``config.json`` of a model folder and the ``ModelSpec`` that it describes, both ways.

A dense model is a LlamaForCausalLM, or one of its relatives that differ in what ``RELATIVES`` says. One with experts,
mixture of depths or norms behind the layers is a SundogMoMaForCausalLM: the same keys, and the others of the spec by
their own names under ``moma``, which a dense model of several modalities has too.
"""

from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from data.files import read_json
from models.spec import DEFAULT_CONTEXT, ROPE_KINDS, ModelSpec, RopeSpec

CONFIG = "config.json"
ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"
MOMA, MOMA_TYPE = "SundogMoMaForCausalLM", "sundog_moma"
# Architectures with the names and the arithmetic of a Llama but for these fields of the spec.
RELATIVES: dict[str, dict[str, Any]] = {
    ARCHITECTURE: {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
MOMA_KEYS = ("norm", "modalities", "modality_tokens", "depth", "experts")
# Keys that change the arithmetic of a Llama, with the values under which they do not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_encoder_decoder": (False, None),
}
FIX = "use a folder of a Llama-like model, or convert it with transformers"


def read_spec(folder: str | Path) -> ModelSpec:
    """The sizes that a model folder declares.

    Raises:
        DataError: no config.json, another architecture, an option that this model does not have, impossible sizes.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise DataError(str(folder), "", f"a model folder holds {CONFIG}", "give a folder that `sundog export` wrote")
    config = read_json(path)
    if not isinstance(config, dict):
        raise DataError(str(path), type(config).__name__, "must hold one JSON object", FIX)
    return spec_from_config(config, str(path))


def spec_from_config(config: dict[str, Any], path: str = CONFIG) -> ModelSpec:
    """The spec of a parsed config.json; ``path`` is for messages. Raises DataError as ``read_spec`` does."""
    architectures = config.get("architectures") or [ARCHITECTURE if config.get("model_type") == "llama" else "none"]
    if len(architectures) != 1 or architectures[0] not in (*RELATIVES, MOMA):
        raise DataError(f"{path}: architectures", architectures, f"must be one of {', '.join(RELATIVES)}", FIX)
    for key, neutral in NEUTRAL.items():
        if key == "sliding_window" and config.get("use_sliding_window") is False:
            continue  # Qwen names the size of a window that it does not use
        if config.get(key) not in neutral:
            raise DataError(f"{path}: {key}", config[key], f"must be {neutral[0]!r} or absent", FIX)
    heads = _whole(config, "num_attention_heads", path)
    dim = _whole(config, "hidden_size", path)
    try:
        spec = ModelSpec(
            vocab_size=_whole(config, "vocab_size", path),
            dim=dim,
            layers=_whole(config, "num_hidden_layers", path),
            heads=heads,
            kv_heads=_whole(config, "num_key_value_heads", path, heads),
            head_dim=_whole(config, "head_dim", path, dim // max(1, heads)),
            ffn_dim=_whole(config, "intermediate_size", path),
            rope=_rope(config, path),
            norm_eps=_number(config, "rms_norm_eps", path, 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            init_std=_number(config, "initializer_range", path, 0.02),
            context=_whole(config, "max_position_embeddings", path, DEFAULT_CONTEXT),
            **RELATIVES.get(architectures[0], {}),
        )
        extra = config.get("moma")
        if extra is None and architectures[0] in RELATIVES:
            return spec
        if not isinstance(extra, dict):
            raise TypeError("missing")
        return ModelSpec.from_dict(spec.to_dict() | {name: extra[name] for name in MOMA_KEYS})
    except ConfigError as error:
        raise DataError(f"{path}: {error.field}", error.value, error.rule, FIX) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: moma", str(error), f"must hold {', '.join(MOMA_KEYS)}", FIX) from error


def config_of(spec: ModelSpec, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The config.json of a spec; ``dtype`` is torch's name of the stored type, the ids are the tokenizer's."""
    rope: dict[str, Any] = {"rope_type": spec.rope.kind}
    if spec.rope.kind != "default":
        rope["factor"] = spec.rope.factor
    if spec.rope.kind == "llama3":
        rope["low_freq_factor"] = spec.rope.low_freq_factor
        rope["high_freq_factor"] = spec.rope.high_freq_factor
        rope["original_max_position_embeddings"] = spec.rope.original_context
    moma = spec.routed or spec.norm == "post"
    extra = {name: spec.to_dict()[name] for name in MOMA_KEYS}
    architecture, model_type = MOMA if moma else ARCHITECTURE, MOMA_TYPE if moma else MODEL_TYPE
    if spec.qkv_bias or spec.qk_norm:
        model_type = "qwen2" if spec.qkv_bias else "qwen3"
        architecture = f"{model_type.capitalize()}ForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **({"moma": extra} if moma or len(spec.modalities) > 1 else {}),
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": spec.init_std,
        "max_position_embeddings": spec.context,
        # transformers 5 reads rope_parameters; version 4 and other servers read the two older keys.
        "rope_parameters": {"rope_theta": spec.rope.theta, **rope},
        "rope_theta": spec.rope.theta,
        "rope_scaling": None if spec.rope.kind == "default" else rope,
        **token_ids,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _rope(config: dict[str, Any], path: str) -> RopeSpec:
    """``rope_parameters`` of transformers 5, else ``rope_theta`` and ``rope_scaling`` of version 4."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    found = config.get(name) or {}
    where = f"{path}: {name}"
    if not isinstance(found, dict):
        raise DataError(where, found, "must be a JSON object", FIX)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise DataError(f"{where}.rope_type", kind, f"must be one of {', '.join(ROPE_KINDS)}", FIX)
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise DataError(f"{where}.partial_rotary_factor", found["partial_rotary_factor"], "must be 1.0", FIX)
    theta = _number(found, "rope_theta", where, _number(config, "rope_theta", path, 10000.0))
    if kind == "default":
        return RopeSpec(theta)
    factor = _number(found, "factor", where)
    if kind == "linear":
        return RopeSpec(theta, kind, factor)
    low, high = _number(found, "low_freq_factor", where), _number(found, "high_freq_factor", where)
    if low >= high:
        raise DataError(f"{where}.low_freq_factor", low, f"must be below high_freq_factor ({high})", FIX)
    return RopeSpec(theta, kind, factor, low, high, _whole(found, "original_max_position_embeddings", where))


def _whole(config: dict[str, Any], key: str, path: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{path}: {key}", "missing" if value is None else value, "must be a whole number", FIX)
    return value


def _number(config: dict[str, Any], key: str, path: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise DataError(f"{path}: {key}", "missing" if value is None else value, "must be a number", FIX)
    return float(value)
