"""Prefill strategies: which rows of a prompt are computed, over which tokens. One file each, all in ``PREFILLS``."""

from inference.prefill.base import PrefillStrategy, Surroundings
from inference.prefill.cache_blend import CacheBlend
from inference.prefill.lazy_llm import LazyLLM
from inference.prefill.minference import MInference

__all__ = ["PREFILLS", "PrefillStrategy", "Surroundings"]

PREFILLS: dict[str, type[PrefillStrategy]] = {
    "cache_blend": CacheBlend,
    "lazy_llm": LazyLLM,
    "minference": MInference,
}
