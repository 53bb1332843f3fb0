"""What a run costs, from its config alone: parameters, FLOPs, memory, traffic, horizon. Arithmetic only."""

from dataclasses import dataclass

from conf.rules import mesh_sizes, micro_batch
from conf.schema import ModelConfig, RunConfig

LOGIT_CHUNK = 2**23  # logits that the loss keeps alive at once; 32 MiB in fp32
CACHE_LOGITS, CACHE_ROWS = 2**20, 256  # on a CPU: what its cache holds, but no fewer rows than products need


def logit_rows(vocabulary: int, *, cpu: bool, chunk: int = LOGIT_CHUNK) -> int:
    """Rows whose logits the loss keeps alive at once."""
    rows = max(1, chunk // vocabulary)
    return min(rows, max(CACHE_ROWS, CACHE_LOGITS // vocabulary)) if cpu else rows


def ffn_width(model: ModelConfig) -> int:
    """Hidden width of SwiGLU: as given, or 8/3 of the model's width rounded up to a multiple of 64."""
    return model.ffn_dim or -(-(8 * model.dim // 3) // 64) * 64


def vocabulary(config: RunConfig) -> int:
    """Ids of the vocabulary that `sundog pack` makes: of text, and of an image's begin, end and codes."""
    images = 2 + config.image_tokenizer.codes if config.data.image_tokenizer else 0
    return config.data.vocab_size + images


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the decoder, embedding and head included (once when tied)."""
    head_dim = model.head_dim or model.dim // model.heads
    attention = 2 * model.dim * head_dim * (model.heads + model.kv_heads)
    groups = model.experts.groups or [1]
    block = attention + sum(groups) * 3 * model.dim * ffn_width(model) + 2 * model.dim
    routers = (layer_routers(model) + auxiliary_routers(model)) * model.layers + depth_routers(model)
    embeddings = vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    return model.layers * block + routers + embeddings + model.dim


def layer_routers(model: ModelConfig) -> int:
    """Parameters of the router of one layer's experts; groups of one expert each need none."""
    groups = model.experts.groups
    return model.dim * sum(groups) if groups and max(groups) > 1 else 0


def auxiliary_routers(model: ModelConfig) -> int:
    """Parameters of one layer's auxiliary routers: dim x dim/2, then dim/2 x experts (MoMa, appendix A.2)."""
    if model.experts.causal != "auxiliary" or not layer_routers(model):
        return 0
    return (model.dim // 2) * (model.dim + sum(model.experts.groups))


def depth_layers(model: ModelConfig) -> int:
    """Layers that work on a part of the tokens: every other one, from the first on."""
    return -(-model.layers // 2) if model.depth < 1 else 0


def depth_routers(model: ModelConfig) -> int:
    """Parameters of the routers of those layers, with their auxiliary ones."""
    auxiliary = (model.dim // 2) * (model.dim + 1) if model.experts.causal == "auxiliary" else 0
    return depth_layers(model) * (model.dim + auxiliary)


def flops_per_token(model: ModelConfig, vocab_size: int, context: int) -> tuple[int, int]:
    """Training FLOPs (forward and backward) of one token: (all, of which causal attention).

    Matrix products alone: six FLOPs a matrix parameter that a token meets, and 12 * head width * mean visible keys a
    head for scores and values (causal: half the context), as in PaLM, appendix B. The embedding lookup is no matrix
    product; the head is, tied or not. A token meets ``experts.active`` experts; a layer that takes a part of the tokens
    costs that part of its matrices and the square of it in attention. Auxiliary routers are trained apart and not
    counted.
    """
    head_dim = model.head_dim or model.dim // model.heads
    experts = min(model.experts.active, *model.experts.groups) if model.experts.groups else 1
    matrices = 2 * model.dim * head_dim * (model.heads + model.kv_heads) + layer_routers(model)
    block = 6 * (matrices + experts * 3 * model.dim * ffn_width(model))
    attention = 12 * model.heads * head_dim * (context // 2)
    some = depth_layers(model)
    scores = (model.layers - some + some * model.depth**2) * attention
    depth = 6 * some * model.dim
    head = 6 * vocab_size * model.dim
    return round((model.layers - some + some * model.depth) * block + scores + depth + head), round(scores)


KEYS_TRAVEL = ("ring", "bidirectional_ring", "allgather")  # strategies that move keys and values, not queries


def ring_buffer_bytes(config: RunConfig) -> int:
    """Bytes in flight of sequence parallelism on one rank: two blocks each way, whatever the number of ranks; only
    ``allgather`` and ``allgather_query`` keep what they fetch from all of them."""
    mesh, model = mesh_sizes(config), config.model
    if mesh.cp == 1:
        return 0
    width = 2 if config.trainer.precision == "bf16" else 4
    head_dim = model.head_dim or model.dim // model.heads
    tokens = micro_batch(config) * config.data.context // mesh.cp
    blocks = mesh.cp - 1 if config.sequence.strategy in ("allgather", "allgather_query") else 1
    if config.sequence.strategy in KEYS_TRAVEL:
        return blocks * tokens * 2 * model.kv_heads * head_dim * (2 * width + 2 * 4)
    return blocks * tokens * model.heads * (head_dim * (4 * width + 2 * 4) + 4 * 4)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one layer, forward and backward: on its busiest directed link in one ring step, and
    in all ring steps together."""

    forward_step: int
    backward_step: int
    forward: int
    backward: int


def ring_traffic(config: RunConfig) -> Traffic:
    """Sequence-parallel traffic of one layer and one micro batch.

    TokenRing sends queries one way and partial outputs the other; backward it sends q, dO and two rows of fp32
    statistics one way and fp32 dq the other. The ring sends keys and values, and backward their fp32 gradients as well.
    Upper bounds: under a causal mask, schedules trim what nobody needs.
    """
    mesh, model = mesh_sizes(config), config.model
    n = mesh.cp
    if n == 1:
        return Traffic(0, 0, 0, 0)
    width = 2 if config.trainer.precision == "bf16" else 4
    head_dim = model.head_dim or model.dim // model.heads
    tokens = micro_batch(config) * config.data.context // n
    if config.sequence.strategy in KEYS_TRAVEL:
        kv = tokens * 2 * model.kv_heads * head_dim * width
        dkv = tokens * 2 * model.kv_heads * head_dim * 4
        return Traffic(kv, kv + dkv, (n - 1) * kv, (n - 1) * (kv + dkv))
    q = tokens * model.heads * head_dim * width
    lse = tokens * model.heads * 4
    dq = tokens * model.heads * head_dim * 4
    out = q + lse
    bundle = 2 * q + 2 * lse
    return Traffic(max(q, out), max(bundle, dq), (n - 1) * (q + out), (n - 1) * (bundle + dq))
