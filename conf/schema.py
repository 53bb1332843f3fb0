"""The typed schema of a run: one dataclass a config group, all values with their units.

A group is a decision (``model=small``, ``sequence=token_ring``); the YAML files beside this module hold its options
and the dataclasses hold types and defaults. Strings stand for choices whose legal values are listed in ``CHOICES``;
rules over several fields are in ``conf.rules``.
"""

from dataclasses import dataclass, field

from conf import curate, images, preselect, rephrase, serving, shard
from conf.curate import CurationConfig
from conf.evaluate import EvaluateConfig
from conf.images import ImageTokenizerConfig
from conf.preselect import LadderConfig, PreSelectConfig
from conf.rephrase import RephraseConfig
from conf.serving import GenerateConfig, ServeConfig
from conf.shard import ShardingConfig

STRATEGIES = (
    "local",
    "ring",
    "bidirectional_ring",
    "token_ring",
    "bidirectional_query",
    "tile",
    "ulysses",
    "hybrid",
    "allgather",
    "allgather_query",
)

CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": ("python_docs", "debian_docs", "digit_docs", "path"),
    "data.format": ("auto", "text", "jsonl", "parquet", "arrow", "warc"),
    "data.attention": ("context", "document", "segment"),
    "data.packing": ("concat", "soft", "whole"),
    "data.positions": ("mask", "document", "window"),
    "model.norm": ("pre", "post"),
    "model.experts.routing": ("expert_choice", "token_choice"),
    "model.experts.pool": ("sequence_group", "local"),
    "model.experts.causal": ("threshold", "auxiliary"),
    "order.embedder": ("tfidf", "static", "transformer"),
    "order.kind": ("random", "reference", "algorithm1", "matching"),
    "order.index": ("auto", "flat", "ivf", "hnsw", "cells"),
    "sequence.strategy": (*STRATEGIES, "auto"),
    "sequence.topology": ("auto", "port", "ring", "mesh", "two_level"),
    "sequence.backward": ("same", *STRATEGIES[1:]),
    "sequence.layout": ("contiguous", "zigzag"),
    "trainer.objective": ("tokens", "routers", images.IMAGES),
    "trainer.precision": ("fp32", "bf16"),
    "trainer.recompute": ("none", "selective", "full"),
    "cluster.placement": ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    "tracker.wandb": ("disabled", "offline", "online"),
    "export.dtype": ("fp32", "bf16"),
    "sweep.early_stop": ("none", "median"),
    **curate.CHOICES,
    **images.CHOICES,
    **preselect.CHOICES,
    **rephrase.CHOICES,
    **serving.CHOICES,
    **shard.CHOICES,
}


@dataclass
class ExpertsConfig:
    """Experts in place of every feed-forward layer, in groups of one modality each (MoMa, arXiv 2407.21770)."""

    groups: list[int] = field(default_factory=list)  # experts of each modality; one number: one group for all; []: none
    routing: str = "expert_choice"
    active: float = 1.0  # experts of a token: on average under expert_choice, exactly under token_choice
    noise: bool = False  # Gumbel noise on the routers' logits in training
    pool: str = (
        "sequence_group"  # tokens that compete: those of all ranks that share a sequence, or of one rank (local)
    )
    pool_windows: int = 0  # windows whose tokens compete; 0: all of a micro batch
    causal: str = "threshold"  # choice at inference; auxiliary needs routers trained by trainer.objective=routers
    balance_rate: float = 0.001  # of the biases that even out the load under token_choice, a step


@dataclass
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    dim: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 0  # 0: dim / heads
    ffn_dim: int = 0  # 0: 8/3 of dim, rounded up to a multiple of 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    norm: str = "pre"  # before attention and feed-forward, or after them inside the residual connection (Swin)
    modalities: list[str] = field(default_factory=lambda: ["text"])
    modality_tokens: list[int] = field(default_factory=list)  # ids of each further modality, last in the vocabulary
    depth: float = 1.0  # share of the tokens that every other layer works on (mixture of depths); 1: all
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)


@dataclass
class DataConfig:
    """The corpus, where its stages live, and how windows are cut from it."""

    name: str = "python_docs"
    source: str = "python_docs"
    path: str = ""  # source=path: your file, folder or glob; source=debian_docs: where packages were unpacked
    dir: str = "runs/data/${data.name}"
    format: str = "auto"
    text_field: str = "text"
    id_field: str = "id"
    image_field: str = ""  # of records with images: a list of files, data URLs or bytes; empty: text only
    image_tokenizer: str = ""  # folder of what turns images into tokens; trainer=image_tokenizer puts it there
    limit: int = 0  # documents read, 0: all
    shard_documents: int = 1000  # documents in one unit of work
    context: int = 512  # tokens in one training window
    packing: str = "concat"  # concat: cut at window ends; soft: documents under a quarter window stay whole; whole: all
    unsorted: float = 0.0  # share of the documents that are packed in random order for all that
    attention: str = "context"  # a token sees its window (context), its document or its run of related ones (segment)
    positions: str = "mask"  # restart where attention ends (mask), at each document, or never in a window
    tokenizer: str = ""  # folder or tokenizer.json to load; empty: train one on the corpus
    vocab_size: int = 4096  # of a trained tokenizer
    eval_fraction: float = 0.02  # share of the windows held out for evaluation
    overwrite: bool = False  # remove stage outputs that were made with other settings


@dataclass
class OrderConfig:
    """The order in which documents are written into windows."""

    kind: str = "matching"
    neighbours: int = 20  # k of the neighbour graph
    index: str = "auto"  # how they are found; cells: a join over many nodes
    partitions: int = 0  # of the matching, each a unit of work; 0: one for every four million documents
    near_duplicates: float = 0.8  # word 5-grams in common (Jaccard) from which on the shorter document goes; 0: off
    embedder: str = "tfidf"
    model: str = ""  # folder of a static or transformer embedder: sentence-transformers, Contriever, model2vec
    dimensions: int = 256  # of a document's embedding by tfidf
    features: int = 262_144  # buckets of the hashed TF-IDF


@dataclass
class SequenceConfig:
    """Sequence (context) parallelism; ``strategy=auto`` chooses one for each direction by measured links."""

    strategy: str = "token_ring"
    backward: str = "same"  # the strategy of the backward pass
    layout: str = "zigzag"
    degree: int = 0  # ranks that share one sequence; 0: all ranks (1 for local)
    timeout: float = 60.0  # seconds that a rank waits for another inside attention before it names it and stops
    trace_every: int = 0  # steps between recorded timelines (ring/exposed_comm_ms, a picture in the report); 0: none
    topology: str = "auto"  # how the ranks are joined; auto: measured before training, and planned as port
    island: int = 0  # two_level: ranks that share fast links
    link_gbit: float = 0.0  # of a link (two_level: inside an island), Gbit/s each way; 0: measured before training
    fabric_gbit: float = 0.0  # two_level: of a rank's port between islands; 0: measured
    rank_tflops: float = 0.0  # of block attention on one rank; 0: measured


@dataclass
class TrainerConfig:
    """The training loop."""

    steps: int = 200
    batch: int = 8  # windows in one optimizer step, over all ranks
    micro_batch: int = (
        0  # windows in one forward pass of one data-parallel rank; 0: the rank's whole share of the batch
    )
    lr: float = 3e-3
    min_lr_fraction: float = 0.1
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # global gradient norm; 0: off
    precision: str = "fp32"
    recompute: str = "none"  # activation checkpointing; selective: all but matrix products and attention
    checkpoint_every: int = 50  # steps
    keep_checkpoints: int = 2
    eval_every: int = 50  # steps; 0: never
    eval_windows: int = 16
    log_every: int = 10  # steps between console lines; the JSONL record has every step
    init_from: str = ""  # Hugging Face folder to start from
    objective: str = "tokens"  # routers: auxiliary ones beside the frozen model of init_from; images: their tokenizer
    upcycle_steps: int = 0  # make model.experts from init_from's one a modality; steps until their capacity is model's
    collective_timeout_sec: float = 60.0


@dataclass
class ClusterConfig:
    """The Ray cluster and the gang of ranks on it."""

    address: str = ""  # of a running cluster; empty: a local one is started and stopped
    ranks: int = 1
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    threads_per_rank: int = 0  # intra-op threads; 0: cpus_per_rank
    placement: str = "PACK"
    start_timeout_sec: float = 180.0
    hang_timeout_sec: float = 900.0  # a rank that finishes no step for so long is killed, with its gang
    max_restarts: int = 3  # in a row, without a new checkpoint between them
    min_ranks: int = 0  # a smaller cluster continues with as few, a larger one grows up to ranks; 0: always ranks
    workers: int = 0  # actors of a data stage; 0: one a CPU
    object_store_mb: int = 256  # of a local cluster


@dataclass
class TrackerConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: str = "disabled"
    project: str = "sundog"
    entity: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)


@dataclass
class ExportConfig:
    """A checkpoint as a Hugging Face folder."""

    dir: str = "${run_dir}/hf"
    step: int = 0  # 0: the newest complete checkpoint
    dtype: str = "fp32"


@dataclass
class SweepConfig:
    """Several runs of one command: `sundog sweep KEY=A,B`."""

    metric: str = "eval/loss"  # that decides which run is best
    parallel: int = 0  # jobs at a time, at most; 0: as many as the cluster has CPUs and GPUs for
    early_stop: str = "none"  # median: stop a run that is worse than half of the others at the same step
    grace_steps: int = 0  # no run is stopped before
    variants: list[str] = field(default_factory=list)  # overrides that belong together; each job runs once with each


@dataclass
class RunConfig:
    """Everything that a command needs to know."""

    name: str = "run"
    run_dir: str = "runs/${name}"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curation: CurationConfig = field(default_factory=CurationConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    preselect: PreSelectConfig = field(default_factory=PreSelectConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    rephrase: RephraseConfig = field(default_factory=RephraseConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


GROUPS = ("model", "experts", "data", "curation", "order", "sharding", "sequence", "trainer", "cluster", "tracker")
OVERLAYS = ("experiment", "debug")
