"""The decoder: a Llama-family language model that knows nothing about parallelism or devices."""

import math

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.cache import KVCache
from models.loss import IGNORE, linear_cross_entropy
from models.mlp import SwiGLU
from models.protocols import AttentionCore
from models.rope import Rotation, rotation
from models.spec import ModelSpec, RopeSpec

__all__ = ["Block", "Decoder", "KVCache", "ModelSpec", "RopeSpec"]


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and inside a residual connection."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.dim, eps=spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.mlp_norm = nn.RMSNorm(spec.dim, eps=spec.norm_eps)
        self.mlp = SwiGLU(spec)

    def forward(
        self, x_BSE: Tensor, turn: Rotation, document_ids_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """[batch, sequence, dim] to the same shape."""
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), turn, document_ids_BS, cache)
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))


class Decoder(nn.Module):
    """Token embedding, ``layers`` blocks, a final norm and a head that may share the embedding's weight.

    The sequence that a call receives may be any part of a longer one: ``positions`` say which, and the attention
    core, set by ``set_attention_core``, decides what the tokens attend to.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.dim)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.norm = nn.RMSNorm(spec.dim, eps=spec.norm_eps)
        self.head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
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
            labels as int64), both scalars.
        """
        hidden_BSE = self.hidden(tokens, positions, document_ids, cache)
        if labels is None:
            return self.head(hidden_BSE)
        total = linear_cross_entropy(hidden_BSE.flatten(0, 1), self.head.weight, labels.flatten())
        return total, (labels != IGNORE).sum()

    def hidden(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the head reads, [batch, sequence, dim]. Arguments as in ``forward``."""
        assert cache is None or document_ids is None, "a cache holds one document"
        turn = rotation(positions, self.spec.head_dim, self.spec.rope)
        x_BSE = self.embed(tokens)
        for layer in self.layers:
            x_BSE = layer(x_BSE, turn, document_ids, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x_BSE)

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

        Norms start at 1, all else normal with ``spec.init_std``; projections that write to the residual stream are
        scaled by ``1 / sqrt(2 * layers)`` (GPT-2, section 2.3). Call it before the parameters are sharded.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        residual = 1.0 / math.sqrt(2 * self.spec.layers)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            scale = residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else 1.0
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(values.normal_(0.0, self.spec.init_std * scale, generator=generator))
        return self
