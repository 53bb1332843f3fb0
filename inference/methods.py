"""Which methods beyond plain computing a request asks for, and which of them may change its output."""

from dataclasses import dataclass, fields, replace

from conf.errors import ConfigError
from conf.methods import DRAFTERS, KV_POLICIES, PREFILLS
from conf.serving import EngineConfig

FULL, NONE = "full", "none"


@dataclass(frozen=True)
class Methods:
    """Choices of one request; None: what the engine is set to.

    Raises ConfigError for unknown names and values out of range.
    """

    kv_policy: str | None = None
    kv_budget: float | None = None  # share of a text's tokens that the cache keeps, or that attention reads
    drafter: str | None = None  # or none
    decode_layers: int | None = None  # layers that compute the last token; 0: all, always
    prefill: str | None = None  # how the prompt is computed
    prefill_budget: float | None = None  # share of it that is computed, or that attention reads

    def __post_init__(self) -> None:
        if self.decode_layers is not None and self.decode_layers < 0:
            raise ConfigError("decode_layers", self.decode_layers, "must not be negative", "0 uses all layers")
        names = {"kv_policy": KV_POLICIES, "prefill": PREFILLS, "drafter": (*DRAFTERS, NONE)}
        for field, choices in names.items():
            if (value := getattr(self, field)) is not None and value not in choices:
                raise ConfigError(field, value, f"one of {', '.join(choices)}", "choose one of them")
        for field in ("kv_budget", "prefill_budget"):
            if (value := getattr(self, field)) is not None and not 0 < value <= 1:
                raise ConfigError(field, value, "must be above 0 and at most 1 (all)", "0.2 is a fifth")

    def resolved(self, settings: EngineConfig) -> "Methods":
        """With the engine's settings where the request says nothing."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        usual = Methods(**{field.name: getattr(settings, field.name) for field in fields(Methods)})
        found = replace(usual, **own)
        if found.prefill != FULL and (found.kv_policy != FULL or found.decode_layers):
            rule = "cannot be combined with kv_policy or decode_layers"
            raise ConfigError("prefill", found.prefill, rule, "choose one of them")
        if found.prefill == "cache_blend" and not settings.prefix_cache:
            raise ConfigError("prefill", found.prefill, "needs what engine.prefix_cache keeps", "prefix_cache=true")
        if settings.ranks > 1 and found.lossy:
            rule = "methods that change outputs run on one rank"
            raise ConfigError("engine.ranks", settings.ranks, rule, f"engine.ranks=1, or without {found.lossy[0]}")
        return found

    def drafter_for(self, settings: EngineConfig) -> str:
        """The drafter of a request under an engine's settings. Raises ConfigError for one that the engine lacks."""
        name = self.drafter or (settings.drafter if settings.draft_tokens else NONE)
        if name != NONE and not settings.draft_tokens:
            raise ConfigError("drafter", name, "this engine drafts nothing (draft_tokens is 0)", "leave it out")
        if name in ("dynamic_tree", "spectr") and not settings.draft_model:
            raise ConfigError("drafter", name, "needs a draft model (engine.draft_model)", "choose another drafter")
        return name

    @property
    def lossy(self) -> tuple[str, ...]:
        """What may make the output differ from plain computing, as the response names it; for resolved methods."""
        found = []
        if self.kv_policy != FULL:
            found.append(f"kv_policy={self.kv_policy}:{self.kv_budget:g}")
        if self.prefill != FULL:
            found.append(f"prefill={self.prefill}:{self.prefill_budget:g}")
        if self.decode_layers:
            found.append(f"decode_layers={self.decode_layers}")
        return tuple(found)
