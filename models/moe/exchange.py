"""The tokens of a forward pass as the routers see them, and the exchange that knows where tokens and experts are.

``LocalExchange`` is one process. ``parallel.experts`` has the one for tokens and experts on several ranks; a layer
computes the same with either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fused.grouped import Weights, mix_experts

ABSENT = -1  # modality of a place that holds no token


@dataclass(frozen=True)
class Segment:
    """Tokens that compete with each other: one group of experts, one pool."""

    columns: slice  # of the layer's experts
    tokens: Tensor  # their places among the T tokens, ascending, int64


@dataclass(frozen=True)
class Tokens:
    """Made once a batch and read by all layers. Flattened: N tokens are here, T in all pools that reach here.

    ``index_N`` and ``index_T`` are places in the global batch, the latter ascending; ``allowed_NE`` says which experts
    a token's group has; ``segments`` divide the T tokens. ``places_GN`` are the places of the tokens of all G ranks
    among which tokens travel, ``order_T`` their numbers in that table by ascending place; None on one process.
    """

    index_N: Tensor
    index_T: Tensor
    allowed_NE: Tensor
    segments: Sequence[Segment]
    places_GN: Tensor | None = None
    order_T: Tensor | None = None


class Exchange(Protocol):
    """Where tokens and experts are."""

    def places(self, batch: int, length: int, first_window: int, device: torch.device) -> tuple[Tensor, int]:
        """(place in the global batch of every token here [batch, length], tokens of a whole window)."""
        ...

    def tokens(self, modality_BS: Tensor, index_BS: Tensor, groups: Sequence[int], pool_tokens: int) -> Tokens:
        """Describe a batch.

        Args:
            modality_BS: of each token, ``ABSENT`` for none.
            index_BS: each token's place in the global batch.
            groups: experts of each modality; a single number stands for one group over all tokens.
            pool_tokens: so many consecutive places form a pool.
        """
        ...

    def choose(
        self, values_NE: Tensor, tokens: Tokens, choose: Callable[[Tensor], Tensor], pooled: bool
    ) -> tuple[Tensor, Tensor]:
        """Apply a choice, values to booleans, to all T tokens (``pooled``) or to the N here.

        Returns:
            (what was chosen for the tokens here [N, E], what :meth:`mix` needs to know).
        """
        ...

    def mix(
        self, x_ND: Tensor, tokens: Tokens, chosen: tuple[Tensor, Tensor], gates_NE: Tensor, weights: Weights
    ) -> Tensor:
        """Each token's gated sum of its experts, [N, D]; ``chosen`` is what :meth:`choose` gave."""
        ...

    def sum(self, part: Tensor) -> Tensor:
        """What this rank adds to a gradient that is summed over ranks in fp32, when ``part`` in fp64 is its own: the
        sum of the parts on one rank, zeros on the others, so that it is rounded once."""
        ...


def segments_of(modality_T: Tensor, pool_T: Tensor, groups: Sequence[int]) -> list[Segment]:
    """Divide tokens by group, then pool; a pool without tokens of a group has an empty segment there."""
    segments, start = [], 0
    for group, size in enumerate(groups):
        member = in_group(modality_T, group, groups)
        for pool in pool_T.unique().tolist():
            segments.append(Segment(slice(start, start + size), (member & (pool_T == pool)).nonzero()[:, 0]))
        start += size
    return segments


def in_group(modality: Tensor, group: int, groups: Sequence[int]) -> Tensor:
    """Which tokens the experts of a group may take, bool."""
    return modality != ABSENT if len(groups) == 1 else modality == group


def allowed(modality_N: Tensor, groups: Sequence[int]) -> Tensor:
    """Which experts each token's group has, [tokens, experts] bool."""
    columns = [in_group(modality_N, group, groups)[:, None].expand(-1, size) for group, size in enumerate(groups)]
    return torch.cat(columns, 1)


def rows_of(chosen_NE: Tensor) -> tuple[Tensor, list[int]]:
    """The chosen tokens sorted by expert, then place [rows], and the number of each expert's."""
    counts = chosen_NE.sum(0).tolist()
    return torch.nonzero_static(chosen_NE.T, size=sum(counts))[:, 1], counts


def gates_of(gates_NE: Tensor, chosen_NE: Tensor, dtype: torch.dtype) -> Tensor:
    """The gates of the rows of :func:`rows_of`, in their order."""
    return gates_NE.T[chosen_NE.T].to(dtype)


class LocalExchange:
    """All tokens and all experts are in this process."""

    def places(self, batch: int, length: int, first_window: int, device: torch.device) -> tuple[Tensor, int]:
        start = first_window * length
        return torch.arange(start, start + batch * length, device=device).view(batch, length), length

    def tokens(self, modality_BS: Tensor, index_BS: Tensor, groups: Sequence[int], pool_tokens: int) -> Tokens:
        modality, index = modality_BS.flatten(), index_BS.flatten()
        segments = segments_of(modality, index // pool_tokens, groups)
        return Tokens(index, index, allowed(modality, groups), segments)

    def choose(
        self, values_NE: Tensor, tokens: Tokens, choose: Callable[[Tensor], Tensor], pooled: bool
    ) -> tuple[Tensor, Tensor]:
        chosen = choose(values_NE)
        return chosen, chosen

    def mix(
        self, x_ND: Tensor, tokens: Tokens, chosen: tuple[Tensor, Tensor], gates_NE: Tensor, weights: Weights
    ) -> Tensor:
        rows, counts = rows_of(chosen[0])
        return mix_experts(x_ND, rows, gates_of(gates_NE, chosen[0], x_ND.dtype), counts, weights)

    def sum(self, part: Tensor) -> Tensor:
        return part
