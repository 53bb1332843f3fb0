"""Who computes what: expert choice, token choice and the noise, as pure functions of router logits."""

import math

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF


def capacity(tokens: int, experts: int, active: float) -> int:
    """Tokens that each of ``experts`` takes so that a token has ``active`` experts on average, at most all tokens."""
    return min(tokens, math.ceil(active * tokens / experts - 1e-9))


def expert_choice(logits_NE: Tensor, active: float) -> tuple[Tensor, Tensor]:
    """Every expert takes the tokens with its highest logits (arXiv:2202.09368; MoMa, section 2.2).

    Equal logits go to the earlier token; a logit that is not a number loses against every number.

    Returns:
        (chosen [tokens, experts] bool, the logit of the last token that each expert took [experts]). The latter is
        minus infinity where experts take every token: any other would be taken too.
    """
    tokens, experts = logits_NE.shape
    taken = capacity(tokens, experts, active)
    ranked = logits_NE.detach().masked_fill(logits_NE.isnan(), -torch.inf).T.contiguous()
    if taken in (0, tokens):
        return torch.full_like(ranked, taken > 0, dtype=torch.bool).T, ranked.new_full((experts,), -torch.inf)
    lowest_E1 = ranked.topk(taken, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_EN, equal_EN = ranked > lowest_E1, ranked == lowest_E1
    left_E1 = taken - above_EN.sum(1, keepdim=True)
    chosen_EN = above_EN | (equal_EN & (equal_EN.cumsum(1) <= left_E1))
    return chosen_EN.T, lowest_E1[:, 0]


def token_choice(logits_NE: Tensor, bias_E: Tensor, allowed_NE: Tensor, active: int) -> Tensor:
    """Every token takes its ``active`` best allowed experts by ``sigmoid(logit) + bias``, [tokens, experts] bool.

    The bias steers the choice alone, not the gate (auxiliary-loss-free balancing, arXiv:2408.15664, section 3).
    """
    scores = torch.sigmoid(logits_NE.detach()) + bias_E
    scores = scores.masked_fill(scores.isnan() | ~allowed_NE, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :active]
    return torch.zeros_like(allowed_NE).scatter_(1, best, True) & allowed_NE


def gates(logits_NE: Tensor, chosen_NE: Tensor, evenness: float = 0.0) -> Tensor:
    """``sigmoid(logit)`` where chosen, else 0 (MoMa, equations 1 and 2).

    ``evenness`` 1 divides a token's gates by their sum, between 0 and 1 by that power of it: equal experts with
    ``evenness=1`` give what one of them gives, which is how upcycling starts.
    """
    values = torch.sigmoid(logits_NE).masked_fill(~chosen_NE, 0.0)
    if evenness == 0.0:
        return values
    total = values.sum(1, keepdim=True)
    return values / total.masked_fill(total == 0.0, 1.0) ** evenness


def _mix(x: int) -> int:
    """The 32-bit finaliser of MurmurHash3."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK_32
    return x ^ (x >> 16)


def _mix_tensor(x: Tensor) -> Tensor:
    """:func:`_mix` of int64 values below 2^32; products may wrap, their low 32 bits are right."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK_32
    return x ^ (x >> 16)


def logistic_noise(key: tuple[int, ...], index_N: Tensor, experts: int) -> Tensor:
    """The difference of two Gumbel variables for every token and expert, [tokens, experts], fp32 (MoMa, equation 5).

    A function of the key (seed, step, layer) and a token's place in the global batch: the same on any number of ranks
    and when activations are computed again.
    """
    state = 0
    for number in key:
        state = _mix((state * 31 + number) & MASK_32)
    rows = _mix_tensor((index_N & MASK_32) ^ state) ^ _mix_tensor(index_N >> 32)
    columns = torch.tensor([_mix((state + 0x9E3779B9 * (e + 1)) & MASK_32) for e in range(experts)])
    bits = _mix_tensor(rows[:, None] ^ columns.to(rows.device))
    uniform = (bits.double() + 0.5) / 2**32
    return torch.logit(uniform).float()
