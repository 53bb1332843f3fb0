"""The memory that a training step takes on one rank, from the config alone: the largest of its moments.

What autograd keeps of a block follows from ``models.block``; ``benchmarks.memory`` compares all of it with what torch's
allocator reports. Bytes; ``T`` are the tokens of a micro batch that one rank holds.
"""

from dataclasses import dataclass

from conf.estimate import ffn_width, logit_rows, parameter_count, ring_buffer_bytes
from conf.rules import mesh_sizes, micro_batch
from conf.schema import ModelConfig, RunConfig
from conf.shard import FSDP

ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's defaults for numbers exchanged and gathered at once


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the moment of the step that takes most."""

    state: int  # parameters, the two AdamW moments, and what there is of gradients then
    activations: int
    buffers: int  # of sequence parallelism

    @property
    def total(self) -> int:
        return self.state + self.activations + self.buffers


@dataclass(frozen=True)
class _Kept:
    """Bytes that one block keeps for a token."""

    block: int  # without recomputation
    forward: int  # with the recomputation that the config asks for
    again: int  # what a backward pass computes again of that
    work: int  # of the backward pass through the feed-forward layer


def _kept(model: ModelConfig, bf16: bool, recompute: str) -> _Kept:
    """Each RMSNorm keeps its input, what reads it its result; attention keeps turned queries and keys,
    values, result and log-sum-exp; SwiGLU its gate before and after SiLU, the other branch and their product.

    Under autocast every projection keeps a bf16 copy of its input of its own.
    """
    head_dim = model.head_dim or model.dim // model.heads
    queries, keys, dim = model.heads * head_dim, model.kv_heads * head_dim, model.dim
    wide = round((model.experts.active if model.experts.groups else 1.0) * ffn_width(model))
    width = 2 if bf16 else 4
    norms = 2 * (4 * dim + 4) + (5 * 2 * dim if bf16 else 2 * 4 * dim)
    attention = width * (2 * queries + 2 * keys) + 4 * model.heads
    block = norms + attention + width * 4 * wide
    products = 4 * dim + width * (2 * queries + 2 * keys + 2 * dim + 2 * wide) + 4 * model.heads
    shared = 4 * dim + width * (queries + keys + 2 * wide) + 4 * model.heads  # of both, and so not there twice
    forward, again = {"none": (block, 0), "selective": (products, block - shared), "full": (4 * dim, block)}[recompute]
    return _Kept(block, forward, again, width * 2 * wide + 4 * dim)


def memory_per_rank(config: RunConfig, vocab_size: int) -> Memory:
    """Predict the peak of tensor memory of one rank, in bytes.

    It is the largest of five moments: the loss (which forms its own gradients with the logits of a chunk), its backward
    pass, the backward pass of the last and of the first block, and the embedding's gradient beside all others.
    """
    mesh, model, trainer = mesh_sizes(config), config.model, config.trainer
    bf16 = trainer.precision == "bf16"
    tokens = micro_batch(config) * config.data.context // mesh.cp
    kept = _kept(model, bf16, trainer.recompute)
    parameters, table = parameter_count(model, vocab_size), vocab_size * model.dim
    layer = (parameters - table * (1 if model.tie_embeddings else 2) - model.dim) // model.layers
    lies = _spread(config, parameters, layer, table)
    accumulated = lies.accumulated if trainer.batch // mesh.dp > micro_batch(config) else 0

    hidden = 4 * tokens * model.dim
    rows = logit_rows(vocab_size, cpu=config.cluster.gpus_per_rank == 0)
    logits = min(tokens, 2 * rows) * vocab_size  # of a chunk, and of the one before
    all_kept = model.layers * tokens * kept.forward + 3 * hidden
    casts = 2 * model.layers * layer if bf16 and config.sharding.kind not in FSDP else 0
    loss = (6 * logits + 2 * hidden + 10 * table) if bf16 else (4 * logits + hidden + 4 * table)
    through = tokens * (kept.again + kept.work)
    moments = [
        (accumulated, all_kept + casts + loss),
        (accumulated, all_kept + casts + 2 * (hidden + 4 * table)),
        (lies.bucket + max(accumulated, 4 * table), all_kept - 3 * hidden + through),
        (lies.bucket + max(lies.gradients + lies.whole - 4 * layer, 4 * table), tokens * kept.forward + through),
        (lies.bucket + lies.gradients + lies.whole, 4 * table + hidden),
    ]
    gradients, activations = max(moments, key=sum)
    return Memory(lies.always + gradients, activations + lies.gathered, ring_buffer_bytes(config))


@dataclass(frozen=True)
class _Spread:
    """Bytes of what sharding spreads, or holds beside it."""

    always: int  # weights and moments, and gradients that are never given back
    gradients: int  # at the end of the backward pass
    accumulated: int  # between micro batches
    bucket: int = 0  # in the backward pass, for the exchange
    gathered: int = 0  # weights that are whole for a while
    whole: int = 0  # gradients of the tables that are not spread yet


def _spread(config: RunConfig, parameters: int, layer: int, table: int) -> _Spread:
    """ddp on several ranks keeps its gradients in buckets. FSDP2 gathers the tables and two blocks. ZeRO keeps an fp32
    copy of a rank's part of the weights and exchanges gradients through a bucket as large as the model; stage 3
    keeps the bucket and its part of the gradients, and gathers up to ``ZERO_LIVE`` numbers."""
    mesh, kind = mesh_sizes(config), config.sharding.kind
    tables = table * (1 if config.model.tie_embeddings else 2)
    if kind == "ddp":
        if mesh.ranks == 1:
            return _Spread(12 * parameters, 4 * parameters, 4 * parameters)
        return _Spread(16 * parameters, 4 * table, 0)
    if kind in FSDP:
        part = parameters // (mesh.dp_shard * mesh.cp)
        exchanged = 8 * layer + 4 * layer // (mesh.dp_shard * mesh.cp)  # a block's gradients, whole twice, and the part
        return _Spread(12 * part, 4 * part, 4 * parameters, exchanged, 4 * (tables + 2 * layer), 4 * table)
    part, bucket = parameters // mesh.ranks, 4 * min(parameters, ZERO_BUCKET)
    if kind == "zero3":
        return _Spread(20 * part + bucket, 0, 0, 4 * part, 4 * min(parameters, ZERO_LIVE), 4 * table)
    return _Spread(4 * parameters + 12 * part, 4 * part, 4 * part, bucket, 0, 4 * table)
