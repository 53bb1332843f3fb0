"""One layer of the decoder, for all tokens of a batch or (mixture of depths) for some of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.cache import KVCache
from models.mlp import SwiGLU
from models.moe.exchange import ABSENT, Tokens
from models.moe.layer import ExpertLayer
from models.moe.router import Router, Routing
from models.norm import RMSNorm
from models.rope import Rotation
from models.spec import ModelSpec


@dataclass(frozen=True)
class Batch:
    """What every layer needs to know of the tokens; an object, so that precision policies leave it alone.

    All but ``turn`` may be None; what follows ``cache`` is there for models with routers only.
    """

    turn: Rotation
    document_ids: Tensor | None = None
    cache: KVCache | None = None
    kept: Tensor | None = None  # [S] places of these tokens in the sequence of the pass, where not all of it is here
    modality: Tensor | None = None  # [B, S]
    index: Tensor | None = None  # [B, S] place in the global batch
    pool_tokens: int = 0
    tokens: Tokens | None = None  # for the experts
    windows: Tokens | None = None  # for mixture of depths: each window is a pool


class Block(nn.Module):
    """Attention and feed-forward, each inside a residual connection, with an RMSNorm before it or (Swin) after it."""

    def __init__(self, spec: ModelSpec, layer: int, control: Routing) -> None:
        super().__init__()
        self.post_norm = spec.norm == "post"
        self.attention_norm = RMSNorm(spec.dim, spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.mlp_norm = RMSNorm(spec.dim, spec.norm_eps)
        self.mlp = ExpertLayer(spec, layer, control) if spec.experts.groups else SwiGLU(spec)

    def forward(self, x_BSE: Tensor, batch: Batch) -> Tensor:
        """[batch, sequence, dim] to the same shape."""
        return self.feed(self.attend(x_BSE, batch), batch)

    def attend(self, x_BSE: Tensor, batch: Batch) -> Tensor:
        """The first half."""
        if self.post_norm:
            return x_BSE + self.attention_norm(self._attend(x_BSE, batch))
        return x_BSE + self._attend(self.attention_norm(x_BSE), batch)

    def feed(self, x_BSE: Tensor, batch: Batch) -> Tensor:
        """The second half, which looks at each token alone."""
        if self.post_norm:
            return x_BSE + self.mlp_norm(self._feed(x_BSE, batch))
        return x_BSE + self._feed(self.mlp_norm(x_BSE), batch)

    def _attend(self, x_BSE: Tensor, batch: Batch) -> Tensor:
        return self.attention(x_BSE, batch.turn, batch.document_ids, batch.cache, batch.kept)

    def _feed(self, x_BSE: Tensor, batch: Batch) -> Tensor:
        return self.mlp(x_BSE, batch.tokens) if isinstance(self.mlp, ExpertLayer) else self.mlp(x_BSE)


class DepthBlock(Block):
    """A layer for the tokens that it chooses in each window; the others pass it by (mixture of depths).

    ``y = x + g * (layer(x) - x)`` with the router's score g (arXiv:2404.02258, equation 1), for ``spec.depth`` of the
    tokens. It comes before attention and the experts (MoMa, section 2.3): what is not chosen is not attended to.
    """

    def __init__(self, spec: ModelSpec, layer: int, control: Routing) -> None:
        super().__init__(spec, layer, control)
        self.causal, self.layer, self.control, self.groups = spec.experts.causal, layer, control, spec.experts.groups
        auxiliary = self.causal == "auxiliary"
        self.depth_router = Router(spec.dim, (1,), active=spec.depth, layer=layer, auxiliary=auxiliary)
        self.depth_router.control = control

    def forward(self, x_BSE: Tensor, batch: Batch) -> Tensor:
        """[batch, sequence, dim] to the same shape."""
        assert batch.windows is not None, "a decoder with mixture of depths describes its windows"
        (chosen, _), gates = self.depth_router(x_BSE.flatten(0, 1), batch.windows, self.causal)
        kept_BK, present_BK = compact(chosen.view(x_BSE.shape[:2]))
        if not kept_BK.shape[1]:
            if batch.cache is not None:
                batch.cache.skip(self.layer)
            return x_BSE
        wide = kept_BK[..., None].expand(-1, -1, x_BSE.shape[2])
        some_BKE = x_BSE.gather(1, wide)
        change = super().forward(some_BKE, self._keep(batch, kept_BK, present_BK)) - some_BKE
        gate_BK = gates.view(x_BSE.shape[:2]).gather(1, kept_BK).to(x_BSE.dtype)  # 0 where nothing was chosen
        return x_BSE.scatter_add(1, wide, gate_BK[..., None] * change)

    def _keep(self, batch: Batch, kept_BK: Tensor, present_BK: Tensor) -> Batch:
        """What is known of the chosen tokens alone; places that a shorter row leaves over come last and are absent."""
        turn = Rotation(*(_pick(x, kept_BK) for x in (batch.turn.cos, batch.turn.sin)))
        ids = None if batch.document_ids is None else _pick(batch.document_ids, kept_BK).masked_fill(~present_BK, -1)
        if batch.cache is not None:
            assert len(kept_BK) == 1, "with mixture of depths a cache holds one sequence"
        some = replace(batch, turn=turn, document_ids=ids, kept=kept_BK[0] if batch.cache is not None else None)
        if batch.tokens is None or batch.modality is None or batch.index is None:
            return some
        modality = _pick(batch.modality, kept_BK).masked_fill(~present_BK, ABSENT)
        index = _pick(batch.index, kept_BK)
        return replace(some, tokens=self.control.exchange.tokens(modality, index, self.groups, batch.pool_tokens))


def compact(chosen_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the chosen tokens of each row, ascending [B, K]; which of them are chosen), K the longest row's."""
    counts = chosen_BS.sum(1)
    order = chosen_BS.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return order, torch.arange(order.shape[1], device=order.device) < counts[:, None]


def _pick(x: Tensor, kept_BK: Tensor) -> Tensor:
    """Rows of x [B or 1, S, ...] at the kept places, [B, K, ...]."""
    x = x.expand(len(kept_BK), *x.shape[1:])
    return x.gather(1, kept_BK.view(*kept_BK.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
