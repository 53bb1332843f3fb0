"""Attention over a sequence that is split over the ranks of a process group."""

import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError
from conf.rules import nearest
from fused.mask import CAUSAL, Mask
from parallel.layout import LAYOUTS, Layout
from parallel.ring.operator import Call, attention, place_of
from parallel.strategies import STRATEGIES, find_strategy, rank_divisor

__all__ = ["STRATEGIES", "SequenceParallelCore", "attend", "attend_with_lse", "find_strategy"]

TIMEOUT_SEC = 8.0  # ranks then take up to 1.5 s to find out which one is lost: an error within 10 s


def _call(
    group: dist.ProcessGroup | None,
    strategy: str,
    layout: str | Layout,
    key_layout: str | Layout | None,
    mask: Mask,
    scale: float | None,
    dropout: float,
    timeout: float,
) -> Call:
    chosen = find_strategy(strategy)
    for name in (layout, key_layout):
        if isinstance(name, str) and name not in LAYOUTS:
            raise ConfigError("layout", name, f"one of {', '.join(LAYOUTS)}", nearest(name, tuple(LAYOUTS)))
    world_size = 1 if group is None else dist.get_world_size(group)
    if chosen.single and world_size > 1:
        raise ConfigError(
            "strategy",
            strategy,
            f"it keeps a whole sequence on one rank, the group has {world_size}",
            "strategy=token_ring or ring, or a group of one rank",
        )
    if world_size % rank_divisor(chosen) != 0:
        rule = f"its number divides the ranks of the group, {world_size}"
        raise ConfigError("strategy", strategy, rule, "another number, or none to leave the choice to the strategy")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError("dropout", dropout, "at least 0 and below 1", "0.0")
    keys = layout if key_layout is None else key_layout
    return Call(chosen, None if group is None else group.group_name, layout, keys, mask, scale, dropout, timeout)


def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str,
    layout: str | Layout,
    key_layout: str | Layout | None = None,
    mask: Mask = CAUSAL,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    timeout: float = TIMEOUT_SEC,
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, and the log-sum-exp of the scores ``[batch, local_seq, heads]`` (fp32, not differentiable)."""
    call = _call(group, strategy, layout, key_layout, mask, scale, dropout, timeout)
    out, lse = attention(q, k, v, document_ids, place_of(call), seed)
    return out, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str,
    layout: str | Layout,
    key_layout: str | Layout | None = None,
    mask: Mask = CAUSAL,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    timeout: float = TIMEOUT_SEC,
) -> Tensor:
    """Softmax attention of this rank's queries over the keys of all ranks of ``group``; differentiable.

    Every rank of the group makes the same call on its shard, and takes the backward pass if any does.

    Args:
        q: ``[batch, local_queries, heads, head_dim]``, this rank's shard in the order of its layout.
        k: ``[batch, local_keys, kv_heads, head_dim]``; kv_heads divides heads, query head ``h`` reads key head
            ``h // (heads // kv_heads)``.
        v: ``[batch, local_keys, kv_heads, value_dim]``.
        group: the ranks that share the sequence, in order; None for a sequence that is not split.
        strategy: a name that :func:`parallel.strategies.find_strategy` knows.
        layout: which positions each rank's queries have, a :class:`parallel.layout.Layout`, or the name of one for
            shards of equal length.
        key_layout: the same for the keys, where they are not those of the queries; then the queries' positions count
            in the keys' sequence (``layout.shifted``: new tokens behind a cached prefix).
        mask: what a query sees, see :class:`fused.mask.Mask`; causal by default.
        document_ids: ``[batch, local_keys]`` integers; a document is a run of equal ids in the whole sequence and a
            token sees only its own. Negative ids are padding, which sees padding. They are gathered over the group
            once for each tensor object, so pass the same tensor to all layers.
        scale: of the scores before the softmax; default ``1 / sqrt(head_dim)``.
        dropout: the probability with which a weight is dropped, by a counter that ``seed`` and positions determine:
            the same weights for every strategy and number of ranks.
        seed: of dropout; another one for every layer and step.
        timeout: seconds after which a rank that waits for another gives up and says for which.

    Returns:
        ``[batch, local_queries, heads, value_dim]`` in the dtype of ``q``; softmax, sums and merges are in fp32 (fp64
        for fp64 inputs). A query that sees no key gets 0.

    Raises:
        ConfigError: an unknown strategy or layout, shapes that do not fit together, or ranks whose calls differ.
        RankLost: a rank is lost or does not answer; the message names it.
    """
    out, _ = attend_with_lse(
        *(q, k, v),
        group=group,
        strategy=strategy,
        layout=layout,
        key_layout=key_layout,
        mask=mask,
        document_ids=document_ids,
        scale=scale,
        dropout=dropout,
        seed=seed,
        timeout=timeout,
    )
    return out


class SequenceParallelCore:
    """The attention core that a model is given when its sequences are split: causal :func:`attend` over ``group``."""

    def __init__(
        self, group: dist.ProcessGroup | None, strategy: str, layout: str, timeout: float = TIMEOUT_SEC
    ) -> None:
        self._place = place_of(_call(group, strategy, layout, None, CAUSAL, None, 0.0, timeout))

    def __call__(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, document_ids_BS: Tensor | None, /) -> Tensor:
        """See ``models.protocols.AttentionCore``."""
        return attention(q_BSHD, k_BSKD, v_BSKD, document_ids_BS, self._place, 0)[0]
