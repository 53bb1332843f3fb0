"""The resolved sizes of a decoder."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from conf.errors import ConfigError
from conf.estimate import parameter_count
from conf.schema import ExpertsConfig, ModelConfig

ROPE_KINDS = ("default", "linear", "llama3")
FFN_MULTIPLE = 64
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position settings, as in ``rope_parameters`` of a Hugging Face config.

    The last four fields are read by the scaled kinds only: ``factor`` by linear and llama3, the others by llama3.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # positions of the training that the scaling extends


@dataclass(frozen=True)
class ExpertSpec:
    """The experts of every layer; the fields are those of ``conf.schema.ExpertsConfig``. No groups: a dense layer."""

    groups: tuple[int, ...] = ()
    routing: str = "expert_choice"
    active: float = 1.0
    noise: bool = False
    pool: str = "sequence_group"
    pool_windows: int = 0
    causal: str = "threshold"
    balance_rate: float = 0.001


@dataclass(frozen=True)
class ModelSpec:
    """Everything that determines the shapes and the arithmetic of a ``Decoder``."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    rope: RopeSpec = field(default_factory=RopeSpec)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    context: int = DEFAULT_CONTEXT  # positions that the model is meant for; sizes nothing
    norm: str = "pre"
    modalities: tuple[str, ...] = ("text",)
    modality_tokens: tuple[int, ...] = ()  # ids of each further modality, last in the vocabulary
    depth: float = 1.0
    experts: ExpertSpec = field(default_factory=ExpertSpec)
    qkv_bias: bool = False  # as in Qwen2
    qk_norm: bool = False  # RMSNorm of every head's query and key, as in Qwen3

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "context"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"model.{name}", value, "must be at least 1", "give a positive number")
        if self.heads % self.kv_heads:
            rule = f"must divide model.heads ({self.heads})"
            raise ConfigError("model.kv_heads", self.kv_heads, rule, "choose a divisor of model.heads")
        if self.head_dim % 2:
            rule = "must be even: rotary positions turn pairs of features"
            raise ConfigError("model.head_dim", self.head_dim, rule, "set an even model.head_dim")
        for name, value in (("norm_eps", self.norm_eps), ("rope_theta", self.rope.theta), ("factor", self.rope.factor)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"model.{name}", value, "must be positive and finite", "give a positive number")
        if not (self.init_std >= 0 and math.isfinite(self.init_std)):
            raise ConfigError("model.init_std", self.init_std, "must not be negative", "0.02 is usual")
        if self.rope.kind not in ROPE_KINDS:
            raise ConfigError(
                "rope kind", self.rope.kind, f"must be one of {', '.join(ROPE_KINDS)}", "use another kind"
            )

        if self.modality_starts[:1] and self.modality_starts[0] < 1:
            rule = f"must leave ids for {self.modalities[0]} in a vocabulary of {self.vocab_size}"
            raise ConfigError("model.modality_tokens", list(self.modality_tokens), rule, "a larger vocabulary")

    @property
    def modality_starts(self) -> tuple[int, ...]:
        """The first token id of every modality but the first."""
        ends = [self.vocab_size - sum(self.modality_tokens[i:]) for i in range(len(self.modality_tokens))]
        return tuple(ends)

    @property
    def expert_groups(self) -> tuple[str, ...]:
        """The names of the groups of experts: the modalities, or one for all."""
        return self.modalities if len(self.experts.groups) > 1 else ("all",) * len(self.experts.groups)

    @property
    def routed(self) -> bool:
        """Whether a forward pass has to know its tokens' modalities and places."""
        return bool(self.experts.groups) or self.depth < 1

    def to_dict(self) -> dict[str, Any]:
        """As it is written to JSON; :meth:`from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSpec":
        """Take what :meth:`to_dict` gave."""
        experts = {**values["experts"], "groups": tuple(values["experts"]["groups"])}
        tuples = {name: tuple(values[name]) for name in ("modalities", "modality_tokens")}
        return cls(**{**values, **tuples, "rope": RopeSpec(**values["rope"]), "experts": ExpertSpec(**experts)})

    @classmethod
    def from_config(cls, config: ModelConfig, vocab_size: int, context: int = DEFAULT_CONTEXT) -> "ModelSpec":
        """Resolve the sizes that a config leaves at 0.

        Raises:
            ConfigError: sizes that do not fit each other.
        """
        for name in ("dim", "heads"):
            if getattr(config, name) < 1:
                raise ConfigError(
                    f"model.{name}", getattr(config, name), "must be at least 1", "give a positive number"
                )
        if config.head_dim == 0 and config.dim % config.heads:
            rule = f"must be a multiple of model.heads ({config.heads}) when model.head_dim is 0"
            raise ConfigError("model.dim", config.dim, rule, "change model.dim, or set model.head_dim")
        return cls(
            vocab_size=vocab_size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim or config.dim // config.heads,
            ffn_dim=config.ffn_dim or -(-8 * config.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE,
            rope=RopeSpec(theta=config.rope_theta),
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
            init_std=config.init_std,
            context=context,
            norm=config.norm,
            modalities=tuple(config.modalities),
            modality_tokens=tuple(config.modality_tokens),
            depth=config.depth,
            experts=ExpertSpec(**{**asdict(config.experts), "groups": tuple(config.experts.groups)}),
        )

    def to_config(self) -> ModelConfig:
        """The sizes as ``conf.estimate`` reads them."""
        experts = ExpertsConfig(**{**asdict(self.experts), "groups": list(self.experts.groups)})
        own = {name: getattr(self, name) for name in ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim")}
        return ModelConfig(**own, tie_embeddings=self.tie_embeddings, depth=self.depth, experts=experts)

    def parameters(self) -> int:
        """Number of trainable numbers; a tied embedding counts once."""
        heads = self.qkv_bias * (self.heads + 2 * self.kv_heads) + self.qk_norm * 2
        return parameter_count(self.to_config(), self.vocab_size) + self.layers * heads * self.head_dim
