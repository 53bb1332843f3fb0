"""Which methods beyond plain computing a request asks for, and which of them may change its output."""

from dataclasses import dataclass, replace

from conf.errors import ConfigError
from conf.methods import KV_POLICIES
from conf.serving import EngineConfig

FULL = "full"


@dataclass(frozen=True)
class Methods:
    """Choices of one request; None: what the engine is set to.

    Raises ConfigError for unknown names and values out of range.
    """

    kv_policy: str | None = None
    kv_budget: float | None = None  # share of a text's tokens that the cache keeps, or that attention reads

    def __post_init__(self) -> None:
        if self.kv_policy is not None and self.kv_policy not in KV_POLICIES:
            raise ConfigError("kv_policy", self.kv_policy, f"one of {', '.join(KV_POLICIES)}", "choose one of them")
        if self.kv_budget is not None and not 0 < self.kv_budget <= 1:
            raise ConfigError("kv_budget", self.kv_budget, "must be above 0 and at most 1 (all)", "0.2 keeps a fifth")

    def resolved(self, settings: EngineConfig) -> "Methods":
        """With the engine's settings where the request says nothing."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return replace(Methods(settings.kv_policy, settings.kv_budget), **own)

    @property
    def lossy(self) -> tuple[str, ...]:
        """What may make the output differ from plain computing, as the response names it; for resolved methods."""
        found = []
        if self.kv_policy != FULL:
            found.append(f"kv_policy={self.kv_policy}:{self.kv_budget:g}")
        return tuple(found)
