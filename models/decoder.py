"""The decoder: a Llama-family language model that knows nothing about parallelism or devices."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.block import Batch, Block, DepthBlock
from models.cache import KVCache
from models.linear import Linear
from models.loss import IGNORE, linear_cross_entropy
from models.moe.exchange import ABSENT, LocalExchange
from models.moe.router import Router, Routing
from models.norm import RMSNorm
from models.protocols import AttentionCore
from models.rope import rotation
from models.spec import ModelSpec, RopeSpec

__all__ = ["Block", "Decoder", "KVCache", "ModelSpec", "RopeSpec"]


class Decoder(nn.Module):
    """Token embedding, ``layers`` blocks, a final norm and a head that may share the embedding's weight.

    The sequence that a call receives may be any part of a longer one: ``positions`` say which, and the attention
    core, set by ``set_attention_core``, decides what the tokens attend to.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.control = Routing()
        self.seen: Tensor | None = None  # of the last call with labels, see ``_by_modality``
        self.embed = nn.Embedding(spec.vocab_size, spec.dim)
        kinds = [DepthBlock if spec.depth < 1 and layer % 2 == 0 else Block for layer in range(spec.layers)]
        self.layers = nn.ModuleList(kind(spec, layer, self.control) for layer, kind in enumerate(kinds))
        self.norm = RMSNorm(spec.dim, spec.norm_eps)
        self.head = Linear(spec.dim, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss when labels are given.

        Both live behind ``forward`` because wrappers (DDP, FSDP2) only act around that method.

        Args:
            tokens: [batch, sequence], int64.
            positions: [batch, sequence], int64.
            document_ids: [batch, sequence] or None; see ``AttentionCore``. Not together with a cache.
            cache: earlier tokens of the same sequences; the new ones are added to it.
            labels: [batch, sequence], int64, ``-100`` where there is none.

        Returns:
            Logits [batch, sequence, vocabulary]; with labels the pair (sum of token losses in fp32, number of
            labels as int64), both scalars. While ``control.learn_auxiliary`` is set, the loss is that of the
            auxiliary routers, scaled to the number of labels.
        """
        hidden_BSE = self.hidden(tokens, positions, document_ids, cache)
        if labels is None:
            return self.head(hidden_BSE)
        if self.control.learn_auxiliary:
            return self._auxiliary_loss((labels != IGNORE).sum())
        total, each_N = linear_cross_entropy(hidden_BSE.flatten(0, 1), self.head.weight, labels.flatten())
        self.seen = self._by_modality(each_N, labels.flatten())
        return total, (labels != IGNORE).sum()

    def hidden(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the head reads, [batch, sequence, dim]. Arguments as in ``forward``."""
        assert cache is None or document_ids is None, "a cache holds one document"
        x_BSE, batch = self.embed(tokens), self.describe(tokens, positions, document_ids, cache)
        for layer in self.layers:
            x_BSE = layer(x_BSE, batch)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x_BSE)

    def routers(self) -> list[Router]:
        """Those of the experts and of mixture of depths, in the order of the layers."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def modality_of(self, tokens: Tensor) -> Tensor:
        """The number of each token's modality, by its range of ids; int64, in the shape of the tokens."""
        starts = torch.tensor(self.spec.modality_starts, dtype=tokens.dtype, device=tokens.device)
        return torch.bucketize(tokens, starts, right=True)

    def _by_modality(self, losses_N: Tensor, labels_N: Tensor) -> Tensor:
        """Sums of the losses and numbers of the labels of each modality, fp64 [2, modalities], without gradient."""
        known = labels_N != IGNORE
        weights_2N = torch.stack([losses_N.detach().double(), known.double()])
        if len(self.spec.modalities) == 1:
            return weights_2N.sum(1, keepdim=True)
        sums = weights_2N.new_zeros(2, len(self.spec.modalities))
        return sums.index_add_(1, self.modality_of(labels_N.clamp_min(0)), weights_2N)

    def describe(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Batch:
        """What all layers need to know of these tokens."""
        spec, exchange = self.spec, self.control.exchange
        batch = Batch(rotation(positions, spec.head_dim, spec.rope), document_ids, cache)
        if not spec.routed:
            return batch
        modality = self.modality_of(tokens)
        if document_ids is not None:
            modality = modality.masked_fill(document_ids < 0, ABSENT)
        windows, length = tokens.shape
        index, window = exchange.places(windows, length, self.control.first_window, tokens.device)
        pool = window * (spec.experts.pool_windows or windows)
        described = exchange.tokens(modality, index, spec.experts.groups, pool) if spec.experts.groups else None
        each = LocalExchange().tokens(modality, index, (1,), window) if spec.depth < 1 else None
        return replace(batch, modality=modality, index=index, pool_tokens=pool, tokens=described, windows=each)

    def _auxiliary_loss(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over routers and decisions, times the number of labels."""
        losses = [router.auxiliary_loss for router in self.routers() if router.auxiliary_loss is not None]
        mean = torch.stack([total / max(number, 1) for total, number in losses]).mean()
        return mean * labels, labels

    def loss(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, document_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(sum of token losses in fp32, number of labels that are not -100); see ``forward``."""
        return self(tokens, positions, document_ids, labels=labels)

    def set_attention_core(self, core: AttentionCore) -> None:
        """Let ``core`` do the attention of every layer."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_core = core

    @torch.no_grad()
    def initialise(self, seed: int) -> "Decoder":
        """Fill the weights from ``seed`` alone, equal on every rank and device; returns the model.

        Norms start at 1, corrections of auxiliary routers at 0, all else normal with ``spec.init_std``; projections
        that write to the residual stream are scaled by ``1 / sqrt(2 * layers)`` (GPT-2, section 2.3). Call it before
        the parameters are sharded.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        residual = 1.0 / math.sqrt(2 * self.spec.layers)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            if name.endswith(".auxiliary.out.weight"):
                parameter.zero_()
                continue
            scale = residual if name.endswith(("attention.out.weight", "mlp.down.weight", ".down")) else 1.0
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(values.normal_(0.0, self.spec.init_std * scale, generator=generator))
        return self
