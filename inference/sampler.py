"""How the next token is chosen from logits."""

import secrets
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conf.errors import ConfigError, DataError

MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingParams:
    """Choices of one request.

    ``temperature`` 0 is greedy and ignores ``top_p``, ``top_k`` and ``seed``. The filters apply in the order
    temperature, ``top_k``, ``top_p``. A ``seed`` makes the request reproducible, whatever runs beside it; None draws
    a fresh one. ``stop`` strings end the text and are not part of it. ``max_tokens`` None means up to the context.

    Raises ConfigError for a value out of range.
    """

    max_tokens: int | None = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError("max_tokens", self.max_tokens, "must be at least 1", "ask for one token or more")
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(
                "temperature", self.temperature, "must be from 0 to 100", "0 is greedy, 1 the model's own"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError("top_p", self.top_p, "must be above 0 and at most 1", "1 keeps all tokens")
        if self.top_k < 0:
            raise ConfigError("top_k", self.top_k, "must not be negative", "0 keeps all tokens")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise ConfigError("stop", list(self.stop), f"at most {MAX_STOPS} strings, none empty", "give fewer strings")


class Sampler:
    """The random choices of one request.

    The number drawn for a token depends on the seed and the token's index alone, so neither batching nor an
    interruption changes a seeded result.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._key = seed % 2**64

    def uniform(self, index: int) -> float:
        """The number in [0, 1) that belongs to the ``index``-th token of the output."""
        return float(np.random.Generator(np.random.Philox(key=self._key, counter=[0, index, 0, 0])).random())

    def choose(self, logits_V: Tensor, index: int) -> int:
        """The ``index``-th token of the output, from logits of shape [vocabulary].

        Raises DataError when the logits are not finite: the weights are broken.
        """
        if not bool(logits_V.isfinite().all()):
            raise DataError(
                "model", "logits that are not finite", "weights give finite logits", "export the model again"
            )
        if self.params.temperature == 0.0:
            return int(logits_V.argmax())
        probabilities, ids = filtered(logits_V, self.params)
        total = probabilities.cumsum(0)
        place = int(torch.searchsorted(total, self.uniform(index) * float(total[-1]), right=True))
        place = min(place, probabilities.numel() - 1)
        return place if ids is None else int(ids[place])


def filtered(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities (fp64, not renormalised) of the tokens that stay, and their ids; None: all of them in order.

    ``top_p`` keeps the most probable tokens up to the one with which their sum reaches it (arXiv:1904.09751).
    """
    logits = logits_V.double()
    probabilities = ((logits - logits.max()) / params.temperature).softmax(0)
    size = probabilities.numel()
    if params.top_k in range(1, size):
        probabilities, ids = probabilities.topk(params.top_k)
        probabilities = probabilities / probabilities.sum()
    elif params.top_p < 1.0:
        probabilities, ids = probabilities.sort(descending=True, stable=True)
    else:
        return probabilities, None
    if params.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities
        kept = max(1, int((before < params.top_p).sum()))
        probabilities, ids = probabilities[:kept], ids[:kept]
    return probabilities, ids
