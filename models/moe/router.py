"""Routers: which tokens the experts of a layer take, in training and, without looking ahead, at inference."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.moe.choice import expert_choice, gates, logistic_noise, token_choice
from models.moe.exchange import Exchange, LocalExchange, Tokens

EPS = 1e-6  # of thresholds from 0 and 1
CALIBRATION = 0.02  # weight of a step in the running thresholds once 1 / CALIBRATION steps were seen
AUXILIARY_CALIBRATION = 0.2  # the same for auxiliary routers, which change while they learn
ROWS = 256  # of tokens whose router gradient is summed at once: few enough for the caches in fp64

Choice = tuple[Tensor, Tensor]  # as Exchange.choose gives it


@dataclass
class Routing:
    """How all routers of one model choose now; one object that they share and that a trainer changes between steps."""

    exchange: Exchange = field(default_factory=LocalExchange)
    way: str = ""  # experts, threshold or auxiliary; empty: experts in training, else the model's own causal way
    seed: int = 0
    step: int = 0
    first_window: int = 0  # number in the global batch of the first window of this forward pass
    learn_auxiliary: bool = False


@dataclass
class Observed:
    """Sums of what a router did since they were last taken; E experts, G groups."""

    load: Tensor  # [E] tokens taken
    covered: Tensor  # [G, 3] tokens with 0, 1, 2 or more experts
    lowest: Tensor  # [E] scores of the last tokens taken
    pools: Tensor  # [E] that these come from
    lowest_auxiliary: Tensor  # [E] the same of the auxiliary router
    guessed: Tensor  # [3] auxiliary decisions: all, right ones, tokens taken


class _Logits(torch.autograd.Function):
    """``x W'`` whose weight gradient is summed in fp64, over ranks too: it hardly depends on who has which tokens."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(x_ND, weight_ED)
        return F.linear(x_ND, weight_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_ED = ctx.saved_tensors
        d_weight = torch.zeros_like(weight_ED, dtype=torch.float64)
        for d_rows, rows in zip(grads[0].split(ROWS), x_ND.split(ROWS), strict=True):
            d_weight.addmm_(d_rows.T.double(), rows.double())
        return grads[0] @ weight_ED, ctx.exchange.sum(d_weight).to(weight_ED.dtype), None


class AuxiliaryRouter(nn.Module):
    """Corrects from one token what the thresholds choose: ``W2 silu(W1 x)`` (MoMa, section 2.4 and appendix A.2)."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2, bias=False)
        self.out = nn.Linear(dim // 2, experts, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(x_ND)))


class Router(nn.Module):
    """One logit for every token and expert, in fp32, and the choice that follows.

    Expert choice looks at the whole pool, which holds later tokens too. At inference a token goes to the experts whose
    threshold its score reaches: the running mean of the lowest score that the expert accepted in training. So what
    follows a token never changes what is computed for it.
    """

    def __init__(
        self,
        dim: int,
        groups: tuple[int, ...],
        *,
        active: float,
        layer: int,
        routing: str = "expert_choice",
        noise: bool = False,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.groups, self.routing, self.noise, self.layer = groups, routing, noise, layer
        self.active = active  # experts of a token
        self.evenness = 0.0  # of the gates; see ``choice.gates``
        experts = sum(groups)
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.bias: Tensor  # token choice
        self.threshold: Tensor  # expert choice
        self.steps: Tensor
        self.auxiliary_threshold: Tensor
        if routing == "token_choice":
            self.register_buffer("bias", torch.zeros(experts))
        else:
            self.register_buffer("threshold", torch.full((experts,), 0.5))
            self.register_buffer("steps", torch.zeros(experts))  # that the thresholds were calibrated in
        self.auxiliary = AuxiliaryRouter(dim, experts) if auxiliary else None
        if auxiliary:
            self.register_buffer("auxiliary_threshold", torch.full((experts,), 0.5))
        self.control = Routing()
        self.observed: Observed | None = None
        self.auxiliary_loss: tuple[Tensor, int] | None = None  # (sum, number) of the last forward pass

    def forward(self, x_ND: Tensor, tokens: Tokens, causal: str) -> tuple[Choice, Tensor]:
        """(choice of the tokens here, their gates [N, E] in fp32); ``causal``: how the model chooses at inference."""
        way = self.control.way or ("experts" if self.training else causal)
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
            logits_NE = _Logits.apply(x_ND, self.weight.to(x_ND.dtype), self.control.exchange)
            assert isinstance(logits_NE, Tensor)
            noisy_NE = logits_NE + self._noise(tokens.index_N) if self._noisy else logits_NE
            if self.routing == "token_choice":
                choice = self._by_token(noisy_NE, tokens)
            elif way == "experts":
                choice = self._by_expert(logits_NE.detach(), tokens)
            else:
                choice = self._by_threshold(x_ND, logits_NE, tokens, way)
            if self.training:
                self._observe(choice[0], tokens)
            if self.control.learn_auxiliary and self.training:
                self._learn(self._guess(x_ND, logits_NE), choice[0], tokens)
            return choice, gates(noisy_NE, choice[0], self.evenness)

    @property
    def _noisy(self) -> bool:
        return self.noise and self.training and not self.control.learn_auxiliary

    def _noise(self, index: Tensor) -> Tensor:
        return logistic_noise((self.control.seed, self.control.step, self.layer), index, sum(self.groups))

    def _by_token(self, logits_NE: Tensor, tokens: Tokens) -> Choice:
        chosen = token_choice(logits_NE, self.bias, tokens.allowed_NE, int(self.active))
        return self.control.exchange.choose(chosen, tokens, lambda x: x, pooled=False)

    def _by_expert(self, logits_NE: Tensor, tokens: Tokens) -> Choice:
        def choose(clean_TE: Tensor) -> Tensor:
            noisy_TE = clean_TE + self._noise(tokens.index_T) if self._noisy else clean_TE
            chosen, lowest, pools = self._compete(noisy_TE, tokens)
            if self.training:
                if self._noisy:  # thresholds are for logits without noise
                    _, lowest, pools = self._compete(clean_TE, tokens)
                seen = self._seen()
                seen.lowest += lowest
                seen.pools += pools
            return chosen

        return self.control.exchange.choose(logits_NE, tokens, choose, pooled=True)

    def _compete(self, logits_TE: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(chosen [T, E], sum over pools of the lowest accepted score [E], number of such pools [E])."""
        chosen = torch.zeros_like(logits_TE, dtype=torch.bool)
        lowest, pools = logits_TE.new_zeros(2, logits_TE.shape[1])
        for segment in tokens.segments:
            if segment.tokens.numel():
                mine, last = expert_choice(logits_TE[segment.tokens, segment.columns], self.active)
                chosen[segment.tokens, segment.columns] = mine
                lowest[segment.columns] += torch.sigmoid(last)
                pools[segment.columns] += 1
        return chosen, lowest, pools

    def _by_threshold(self, x_ND: Tensor, logits_NE: Tensor, tokens: Tokens, way: str) -> Choice:
        logits, threshold = logits_NE, self.threshold
        if way == "auxiliary":
            logits, threshold = self._guess(x_ND, logits_NE), self.auxiliary_threshold
        accepted = (torch.sigmoid(logits.detach().float()) >= threshold) & tokens.allowed_NE
        return self.control.exchange.choose(accepted, tokens, lambda x: x, pooled=False)

    def _guess(self, x_ND: Tensor, logits_NE: Tensor) -> Tensor:
        """Logits of the auxiliary choice, [N, E] in fp32: how far the router's own lie above the threshold, corrected.

        The paper's router of this form guesses from the token alone and has to find again what the frozen router says.
        """
        assert self.auxiliary is not None, "this model has no auxiliary routers"
        return (self.auxiliary(x_ND.detach()) + logits_NE.detach() - torch.logit(self.threshold, EPS)).float()

    def _seen(self) -> Observed:
        if self.observed is None:
            buffer, experts, groups = next(self.buffers()), sum(self.groups), len(self.groups)
            sizes = ((experts,), (groups, 3), (experts,), (experts,), (experts,), (3,))
            self.observed = Observed(*(buffer.new_zeros(size, dtype=torch.float32) for size in sizes))
        return self.observed

    def _observe(self, chosen_NE: Tensor, tokens: Tokens) -> None:
        seen = self._seen()
        seen.load += chosen_NE.sum(0)
        many_N = chosen_NE.sum(1).clamp_max(2)
        start = 0
        for group, size in enumerate(self.groups):
            member_N = tokens.allowed_NE[:, start]
            seen.covered[group] += torch.stack([(member_N & (many_N == n)).sum() for n in range(3)])
            start += size

    def _learn(self, logits_NE: Tensor, chosen_NE: Tensor, tokens: Tokens) -> None:
        """Binary cross-entropy of the auxiliary router against the experts' choice; calibrates its thresholds."""
        seen = self._seen()

        def calibrate(logits_TE: Tensor) -> Tensor:
            chosen, lowest, _ = self._compete(logits_TE, tokens)
            seen.lowest_auxiliary += lowest
            return chosen

        self.control.exchange.choose(logits_NE.detach(), tokens, calibrate, pooled=True)
        allowed_NE = tokens.allowed_NE
        guess_NE = (torch.sigmoid(logits_NE.detach()) >= self.auxiliary_threshold) & allowed_NE
        right = ((guess_NE == chosen_NE) & allowed_NE).sum()
        seen.guessed += torch.stack([allowed_NE.sum(), right, guess_NE.sum()])
        losses = F.binary_cross_entropy_with_logits(logits_NE, chosen_NE.float(), reduction="none")
        self.auxiliary_loss = losses.masked_fill(~allowed_NE, 0.0).sum(), int(allowed_NE.sum())

    def take_observed(self) -> Observed:
        """What was observed since the last call."""
        seen = self._seen()
        self.observed = None
        return seen

    @torch.no_grad()
    def calibrate(self, seen: Observed, balance_rate: float) -> None:
        """Move thresholds, or the biases of token choice, by what all ranks together observed in a step."""
        if self.routing == "token_choice":
            start = 0
            for size in self.groups:
                load = seen.load[start : start + size]
                self.bias[start : start + size] += balance_rate * torch.sign(load.mean() - load)
                start += size
            return
        self.steps += seen.pools > 0
        weight = torch.where(seen.pools > 0, (1.0 / self.steps.clamp_min(1)).clamp_min(CALIBRATION), 0.0)
        number = seen.pools.clamp_min(1)
        self.threshold.lerp_(seen.lowest / number, weight)
        if self.control.learn_auxiliary:
            self.auxiliary_threshold.lerp_(seen.lowest_auxiliary / number, (seen.pools > 0) * AUXILIARY_CALIBRATION)
