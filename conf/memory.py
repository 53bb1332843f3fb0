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

    It is the largest of six moments: the loss (which forms its own gradients with the logits of a chunk), its backward
    pass, the backward pass of the last and of the first block, the embedding's gradient beside all others, and the
    exchange of gradients where that comes at the end.
    """
    mesh, model, trainer = mesh_sizes(config), config.model, config.trainer
    bf16 = trainer.precision == "bf16"
    tokens = micro_batch(config) * config.data.context // mesh.cp
    kept = _kept(model, bf16, trainer.recompute)
    parameters, table = parameter_count(model, vocab_size), vocab_size * model.dim
    layer = (parameters - table * (1 if model.tie_embeddings else 2) - model.dim) // model.layers
    lies = _spread(config, parameters, layer, table)
    again = trainer.batch // mesh.dp > micro_batch(config)  # gradients of earlier micro batches are there
    kept_bucket = lies.bucket if again and config.sharding.kind == "zero1" else 0
    accumulated = lies.accumulated if again else 0

    hidden = 4 * tokens * model.dim
    rows = logit_rows(vocab_size, cpu=config.cluster.gpus_per_rank == 0)
    logits = min(tokens, 2 * rows) * vocab_size  # of a chunk, and of the one before
    all_kept = model.layers * tokens * kept.forward + 3 * hidden
    casts = 2 * model.layers * layer if bf16 and config.sharding.kind not in FSDP else 0
    loss = (6 * logits + 2 * hidden + 10 * table) if bf16 else (4 * logits + hidden + 4 * table)
    through = tokens * (kept.again + kept.work)
    forward, backward = lies.gathered, lies.gathered + lies.prefetched
    own = lies.bucket + accumulated + 4 * table
    moments = [
        (kept_bucket + accumulated, all_kept + casts + loss + forward),
        (kept_bucket + accumulated, all_kept + casts + 2 * (hidden + 4 * table) + forward),
        (own, all_kept - 3 * hidden + through + backward),
        (max(lies.before, own), tokens * kept.forward + through + backward),
        (max(lies.end, lies.bucket + accumulated), 4 * table + hidden + backward),
        (lies.exchange, lies.gathered),
    ]
    gradients, activations = max(moments, key=sum)
    return Memory(lies.always + gradients, activations, ring_buffer_bytes(config))


@dataclass(frozen=True)
class _Spread:
    """Bytes of what sharding spreads, or holds beside it."""

    always: int  # weights and moments, and gradients that are never given back
    before: int  # gradients of all that comes before the first block in the backward pass
    end: int  # all gradients but the embedding's own
    accumulated: int  # between micro batches
    bucket: int = 0  # in the backward pass, for the exchange
    gathered: int = 0  # weights that are whole for a while
    prefetched: int = 0  # of the next block, in the backward pass
    exchange: int = 0  # of gradients, all at once after the backward pass


def _spread(config: RunConfig, parameters: int, layer: int, table: int) -> _Spread:
    """ddp on several ranks keeps its gradients in buckets, those of earlier micro batches beside them.

    FSDP2 gathers the tables and a block, and in the backward pass the next one; a block's gradients are whole until the
    next one's are, the table's until the end.

    ZeRO keeps an fp32 copy of a rank's part of the weights and collects gradients in a bucket as large as the model,
    which is exchanged when all are there: as one flat copy of it, of which gloo makes another to scatter it (stage 3).
    Stage 1 also keeps what autograd gave it until then; stage 3 keeps the bucket and its part of the gradients between
    steps, and gathers up to ``ZERO_LIVE`` numbers.
    """
    mesh, kind = mesh_sizes(config), config.sharding.kind
    tables, whole = 4 * table * (1 if config.model.tie_embeddings else 2), 4 * parameters
    if kind == "ddp" and mesh.ranks == 1:
        return _Spread(3 * whole, whole - 4 * layer, whole, whole)
    if kind == "ddp":
        return _Spread(4 * whole, 4 * table, 4 * table, whole)
    if kind in FSDP:
        ranks = mesh.dp_shard * mesh.cp
        exchanged = 4 * layer + 4 * table
        before = exchanged + (whole - 4 * table - 8 * layer) // ranks
        end = exchanged + (whole - 4 * table) // ranks
        return _Spread(3 * whole // ranks, before, end, whole, 0, tables + 4 * layer, 4 * layer)
    part, bucket = whole // mesh.ranks, min(whole, 4 * ZERO_BUCKET)
    if kind == "zero3":
        flat = bucket * (2 if config.cluster.gpus_per_rank == 0 else 1)
        own = part + 4 * table
        return _Spread(5 * part + bucket, own, own, 0, part, min(whole, 4 * ZERO_LIVE), exchange=flat)
    before, accumulated = (whole - 4 * layer, whole) if kind == "zero1" else (4 * table, part)
    return _Spread(whole + 3 * part, bucket + before, bucket + before, accumulated, bucket, exchange=2 * bucket)
