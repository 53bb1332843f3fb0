"""The resolved sizes of a decoder."""

import math
from dataclasses import dataclass, field

from conf.errors import ConfigError
from conf.schema import ModelConfig

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
        )

    def parameters(self) -> int:
        """Number of trainable numbers; a tied embedding counts once."""
        attention = self.dim * self.head_dim * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.layers * block + self.dim
