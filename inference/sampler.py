"""How the next token is chosen from logits."""

import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from conf.errors import DataError
from inference.params import GREEDY, SamplingParams

LIKELY = 1024  # most probable tokens that are looked at before all of them are sorted


class Sampler:
    """The random choices of one request.

    The number drawn for a token depends on the seed and the token's index alone, so neither batching nor an
    interruption nor drafting changes a seeded result.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self.params = params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._key = seed % 2**64
        self._in_prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self._counts: Counter[int] = Counter()  # of the output's tokens
        self._bias = None
        if params.logit_bias:
            self._bias = torch.tensor(list(params.logit_bias)), torch.tensor(list(params.logit_bias.values()))

    def uniform(self, index: int, draw: int = 0) -> float:
        """The number in [0, 1) that belongs to the ``index``-th token of the output; further ones by ``draw``."""
        return float(np.random.Generator(np.random.Philox(key=self._key, counter=[0, index, draw, 0])).random())

    def count(self, token: int) -> None:
        """Make ``token`` the output's next, for the penalties."""
        self._counts[token] += 1

    def choose(self, logits_V: Tensor, index: int, allowed_V: Tensor | None = None) -> int:
        """The ``index``-th token of the output, from fp32 logits of shape [vocabulary].

        ``allowed_V`` is False where a grammar forbids a token.

        Raises DataError when the logits are not finite: the weights are broken.
        """
        if not bool(logits_V.isfinite().all()):
            raise DataError(
                "model", "logits that are not finite", "weights give finite logits", "export the model again"
            )
        if self.params.touches_logits:
            logits_V = self._adjusted(logits_V)
        if allowed_V is not None:
            logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        if self.params.temperature == GREEDY:
            return int(logits_V.argmax())
        probabilities, ids = filtered(logits_V, self.params)
        total = probabilities.cumsum(0)
        place = int(torch.searchsorted(total, self.uniform(index) * float(total[-1]), right=True))
        place = min(place, probabilities.numel() - 1)
        return place if ids is None else int(ids[place])

    def distribution(self, logits_V: Tensor) -> Tensor:
        """What ``choose`` draws from without a grammar, above temperature 0: fp64, of sum 1, [vocabulary]."""
        probabilities, ids = filtered(self._adjusted(logits_V), self.params)
        if ids is not None:
            probabilities = torch.zeros(logits_V.numel(), dtype=torch.float64).index_add_(0, ids, probabilities)
        return probabilities / probabilities.sum()

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """Bias and penalties: those of the OpenAI API, and CTRL's (arXiv:1909.05858, section 4.1)."""
        logits_V = logits_V.clone()
        params = self.params
        if self._bias is not None:
            logits_V.index_add_(0, *self._bias)
        if params.repetition_penalty != 1.0 and (seen := self._in_prompt | self._counts.keys()):
            ids = torch.tensor(sorted(seen))
            values = logits_V[ids]
            penalty = params.repetition_penalty
            logits_V[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids, times = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * times
        return logits_V


def filtered(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities (fp64, not renormalised) of the tokens that stay, and their ids; None: all of them in order.

    ``top_p`` keeps the most probable tokens up to the one with which their sum reaches it (arXiv:1904.09751);
    ``min_p`` those whose probability is at least that share of the largest (arXiv:2407.01082).
    """
    logits = logits_V.double()
    probabilities = ((logits - logits.max()) / params.temperature).softmax(0)
    size = probabilities.numel()
    if params.top_k in range(1, size):
        probabilities, ids = probabilities.topk(params.top_k)
        probabilities = probabilities / probabilities.sum()
    elif params.top_p < 1.0 or params.min_p > 0.0:
        probabilities, ids = _descending(probabilities, params)
    else:
        return probabilities, None
    kept = probabilities.numel()
    if params.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities
        kept = max(1, int((before < params.top_p).sum()))
    if params.min_p > 0.0:
        kept = min(kept, int((probabilities >= params.min_p * probabilities[0]).sum()))
    return probabilities[:kept], ids[:kept]


def _descending(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The most probable tokens in order: enough of them for ``top_p`` and ``min_p``, seldom all."""
    if probabilities.numel() > LIKELY:
        likely, ids = probabilities.topk(LIKELY)
        if float(likely.sum()) >= params.top_p or float(likely[-1]) < params.min_p * float(likely[0]):
            return likely, ids
    return probabilities.sort(descending=True, stable=True)


def log_probabilities(logits_V: Tensor, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """The model's own log-probability of ``token``, and the ``most`` most probable tokens with theirs."""
    values = logits_V.float().log_softmax(0)
    top, ids = values.topk(min(most, values.numel()))
    return float(values[token]), list(zip(ids.tolist(), top.tolist(), strict=True))
