"""Key-value policies: which tokens the cache keeps or attention reads. One file each, all in ``POLICIES``."""

from inference.policies.base import CacheShape, KVPolicy
from inference.policies.ems import EMS
from inference.policies.h2o import H2O
from inference.policies.keyformer import Keyformer
from inference.policies.sinks_recency import SinksRecency
from inference.policies.squeezed import Squeezed
from inference.policies.token_select import TokenSelect

__all__ = ["POLICIES", "CacheShape", "KVPolicy"]

POLICIES: dict[str, type[KVPolicy]] = {
    "sinks_recency": SinksRecency,
    "h2o": H2O,
    "keyformer": Keyformer,
    "ems": EMS,
    "token_select": TokenSelect,
    "squeezed": Squeezed,
}
