"""Grouped-query attention (arXiv:2305.13245): projections, rotation, and the core that runs on one process."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import KVCache
from models.linear import Linear
from models.norm import RMSNorm
from models.protocols import AttentionCore
from models.rope import Rotation
from models.spec import ModelSpec

QUERY_BLOCK = 512  # rows of a mask that are alive at once


def local_attention(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, document_ids_BS: Tensor | None) -> Tensor:
    """Causal attention over the sequence that this process holds; an ``AttentionCore``."""
    if document_ids_BS is None:
        return _sdpa(q_BSHD, k_BSKD, v_BSKD, causal=True)
    first_BS = first_of_document(document_ids_BS)
    if not first_BS.any():
        return _sdpa(q_BSHD, k_BSKD, v_BSKD, causal=True)
    length = q_BSHD.shape[1]
    positions = torch.arange(length, device=q_BSHD.device)
    outputs = []
    # By blocks of queries: the mask stays small, and keys before the block's oldest document are not read.
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        oldest = int(first_BS[:, start:end].min())
        causal = positions[start:end, None] >= positions[None, oldest:end]
        same = document_ids_BS[:, start:end, None] == document_ids_BS[:, None, oldest:end]
        keys, values = k_BSKD[:, oldest:end], v_BSKD[:, oldest:end]
        outputs.append(_sdpa(q_BSHD[:, start:end], keys, values, mask=(causal & same)[:, None]))
    return torch.cat(outputs, dim=1)


def cached_attention(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Attention of the last S tokens of a sequence over all its T >= S tokens."""
    queries, keys = q_BSHD.shape[1], k_BTKD.shape[1]
    if queries == 1:
        return _sdpa(q_BSHD, k_BTKD, v_BTKD)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BSHD.device).tril(keys - queries)
    return _sdpa(q_BSHD, k_BTKD, v_BTKD, mask=mask)


def first_of_document(document_ids_BS: Tensor) -> Tensor:
    """The smallest index in each row that carries the same id, [batch, sequence]."""
    batch, length = document_ids_BS.shape
    names, compact_BS = document_ids_BS.unique(return_inverse=True)
    indices_BS = torch.arange(length, device=document_ids_BS.device).expand(batch, length)
    first = indices_BS.new_full((batch, names.numel()), length)
    return first.scatter_reduce_(1, compact_BS, indices_BS, "amin").gather(1, compact_BS)


def _sdpa(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Projections around an attention core; Qwen2's have biases, Qwen3 normalises queries and keys."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, spec.head_dim
        self.q = Linear(spec.dim, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.k = Linear(spec.dim, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v = Linear(spec.dim, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.out = Linear(spec.heads * spec.head_dim, spec.dim, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else nn.Identity() for _ in range(2)
        )
        self.attention_core: AttentionCore = local_attention

    def forward(
        self,
        x_BSE: Tensor,
        turn: Rotation,
        document_ids_BS: Tensor | None = None,
        cache: KVCache | None = None,
        places_S: Tensor | None = None,
    ) -> Tensor:
        """[batch, sequence, dim] to the same shape; ``places_S`` as in ``KVCache.append``."""
        batch, length, _ = x_BSE.shape
        split = (batch, length, -1, self.head_dim)
        q_BSHD = turn.apply(self.q_norm(self.q(x_BSE).view(split)))
        k_BSKD = turn.apply(self.k_norm(self.k(x_BSE).view(split)))
        v_BSKD = self.v(x_BSE).view(split)
        if cache is not None:
            past = cache.held(self.layer)
            k_all, v_all = cache.append(self.layer, k_BSKD, v_BSKD, places_S)
            if past:
                return self.out(cached_attention(q_BSHD, k_all, v_all).reshape(batch, length, -1))
        mixed_BSHD = self.attention_core(q_BSHD, k_BSKD, v_BSKD, document_ids_BS)
        return self.out(mixed_BSHD.reshape(batch, length, -1))
