"""Rules that a composed config must keep: choices, ranges, and what must fit together. No value is ever adjusted."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from conf.bounds import FRACTIONS, NOT_NEGATIVE, POSITIVE
from conf.curate import check_curation
from conf.errors import ConfigError
from conf.images import check_images
from conf.rephrase import check_rephrase
from conf.schema import CHOICES, RunConfig
from conf.serving import check_serving
from conf.shard import FSDP, check_sharding, data_parallel, least_data_parallel


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each mesh axis; ``cp`` is context (sequence) parallelism and varies fastest."""

    dp_replicate: int
    dp_shard: int
    cp: int
    ep: int = 1  # expert parallelism, over neighbours in dp_shard x cp

    @property
    def dp(self) -> int:
        """Ranks (or groups of ``cp`` ranks) that read different windows."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks(self) -> int:
        return self.dp * self.cp


def mesh_sizes(config: RunConfig) -> MeshSizes:
    """Resolve the zeros of ``sharding`` and ``sequence`` against ``cluster.ranks``.

    ``sequence.degree=0`` means all ranks that an explicit data parallelism leaves (1 for ``local``); what is left then
    goes to ``dp_replicate`` under ddp and else to ``dp_shard``.

    Raises:
        ConfigError: the product of the axes is not the number of ranks.
    """
    ranks, sharding = config.cluster.ranks, config.sharding
    explicit_dp = least_data_parallel(sharding)
    cp = config.sequence.degree
    if cp == 0:
        cp = 1 if config.sequence.strategy == "local" else max(ranks // explicit_dp, 1)
    if config.sequence.strategy == "local" and cp != 1:
        raise ConfigError(
            "sequence.degree",
            cp,
            "sequence=local keeps a whole sequence on one rank",
            "sequence.degree=1, or sequence=token_ring",
        )
    if ranks % cp != 0:
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        raise ConfigError(
            "sequence.degree", cp, f"it must divide cluster.ranks = {ranks}", f"sequence.degree= one of {divisors}"
        )
    rest = ranks // cp
    replicate, shard = data_parallel(sharding, rest)
    if replicate * shard * cp != ranks:
        raise ConfigError(
            "cluster.ranks",
            ranks,
            f"dp_replicate ({replicate}) x dp_shard ({shard}) x cp ({cp}) must equal the number of ranks",
            "set the sizes you do not care about to 0, or change cluster.ranks",
        )
    ep = sharding.expert_degree
    if ep > 1 and (sharding.kind not in FSDP or (shard * cp) % ep != 0 or (cp % ep != 0 and ep % cp != 0)):
        raise ConfigError(
            "sharding.expert_degree",
            ep,
            f"under fsdp and hsdp it divides dp_shard ({shard}) x cp ({cp}), and it or cp divides the other",
            f"sharding=fsdp sharding.expert_degree={math.gcd(ep, shard * cp)}",
        )
    return MeshSizes(replicate, shard, cp, ep)


def nearest(name: str, names: Sequence[str]) -> str:
    """Return "did you mean ...?" for the closest of ``names``, or an empty string."""
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else ""


def lookup(config: object, key: str) -> object:
    """Return the value behind a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _choices(config: RunConfig) -> None:
    for key, legal in CHOICES.items():
        value = lookup(config, key)
        if value not in legal:
            hint = nearest(str(value), legal)
            raise ConfigError(key, value, f"one of {', '.join(legal)}", hint or f"{key}={legal[0]}")


def _ranges(config: RunConfig) -> None:
    bounds: list[tuple[list[str], Callable[[float], bool], str]] = [
        (POSITIVE, lambda x: x > 0, "it must be greater than 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "it must not be negative"),
        (FRACTIONS, lambda x: 0 <= x <= 1, "it is a fraction between 0 and 1"),
    ]
    default = RunConfig()
    for keys, holds, rule in bounds:
        for key in keys:
            value = lookup(config, key)
            assert isinstance(value, (int, float)), f"{key} is in a table of numbers but is {type(value).__name__}"
            if not math.isfinite(value) or not holds(value):
                raise ConfigError(key, value, rule, f"{key}={lookup(default, key)} is the default")


def _model(config: RunConfig) -> None:
    model = config.model
    if model.heads % model.kv_heads != 0:
        raise ConfigError(
            "model.kv_heads",
            model.kv_heads,
            f"it must divide model.heads = {model.heads}",
            f"model.kv_heads={math.gcd(model.heads, model.kv_heads)}",
        )
    if model.head_dim == 0 and model.dim % model.heads != 0:
        raise ConfigError(
            "model.heads", model.heads, f"it must divide model.dim = {model.dim}", "set model.head_dim, or other heads"
        )
    head_dim = model.head_dim or model.dim // model.heads
    if head_dim % 2 != 0:
        raise ConfigError(
            "model.head_dim", head_dim, "rotary positions need an even width", f"model.head_dim={head_dim + 1}"
        )


def _experts(config: RunConfig) -> None:
    model, experts = config.model, config.model.experts
    kinds, sizes = model.modalities, model.modality_tokens
    if not kinds or len(set(kinds)) != len(kinds) or len(sizes) != len(kinds) - 1 or min(sizes, default=1) < 1:
        raise ConfigError(
            "model.modality_tokens",
            sizes,
            f"ids of every modality but the first of {kinds}, whose names differ",
            "model.modalities=[text,image] model.modality_tokens=[8192]",
        )
    groups = experts.groups
    if groups and (min(groups) < 1 or len(groups) not in (1, len(kinds))):
        raise ConfigError(
            "model.experts.groups",
            groups,
            f"at least one expert for each of the {len(kinds)} modalities {kinds}, or one number for all together",
            "experts=moe_4t4i with a model of text and image, experts=moe_8x with any",
        )
    if groups and experts.active > min(groups):
        raise ConfigError(
            "model.experts.active",
            experts.active,
            f"a token has at most the experts of its group, and the smallest has {min(groups)}",
            f"model.experts.active={min(groups)}",
        )
    if experts.routing == "token_choice" and (experts.active != int(experts.active) or experts.causal != "threshold"):
        raise ConfigError(
            "model.experts.routing",
            experts.routing,
            "tokens choose a whole number of experts, and do so at inference too: they need no auxiliary routers",
            "model.experts.active=1 model.experts.causal=threshold",
        )
    mesh = mesh_sizes(config)
    if mesh.ep > 1 and (not groups or math.gcd(mesh.ep, *groups) != mesh.ep):
        raise ConfigError(
            "sharding.expert_degree",
            mesh.ep,
            f"every rank holds an equal part of every group of experts, {groups}",
            f"sharding.expert_degree={math.gcd(*groups) or 1}",
        )
    if model.depth < 1 and max(mesh.cp, mesh.ep) > 1:
        raise ConfigError(
            "model.depth",
            model.depth,
            "a layer's tokens lie unevenly over ranks that share them: mixture of depths keeps a sequence on one rank",
            "sequence=local sharding.expert_degree=1, or model.depth=1",
        )
    trainer = config.trainer
    for key, used in (("upcycle_steps", trainer.upcycle_steps > 0), ("objective", trainer.objective == "routers")):
        if used and not trainer.init_from:
            rule = "it changes a model that is there already"
            raise ConfigError(f"trainer.{key}", getattr(trainer, key), rule, "trainer.init_from=FOLDER")
    if trainer.upcycle_steps and not groups:
        rule = "upcycling makes experts, and the model has none"
        raise ConfigError("model.experts.groups", groups, rule, "experts=moe_4t4i")
    if experts.causal == "auxiliary" and not trainer.init_from:
        raise ConfigError(
            "model.experts.causal",
            experts.causal,
            "auxiliary routers are trained in a stage of their own, beside a model that is there already",
            "train with threshold first, then trainer.objective=routers trainer.init_from=FOLDER",
        )
    if experts.pool_windows and micro_batch(config) % experts.pool_windows != 0:
        raise ConfigError(
            "model.experts.pool_windows",
            experts.pool_windows,
            f"it divides the windows of one forward pass, {micro_batch(config)}",
            "another trainer.micro_batch, or model.experts.pool_windows=1",
        )


def _sequence(config: RunConfig) -> None:
    cp = mesh_sizes(config).cp
    sequence = config.sequence
    if sequence.strategy == "auto" and sequence.backward != "same":
        rule = "sequence=auto chooses both directions"
        raise ConfigError("sequence.backward", sequence.backward, rule, "sequence.backward=same")
    if sequence.topology == "two_level" and cp > 1 and (sequence.island < 2 or cp % sequence.island != 0):
        rule = f"two_level joins islands of equal size, at least 2 and a divisor of the {cp} ranks of a sequence"
        raise ConfigError("sequence.island", sequence.island, rule, f"sequence.island={cp}")
    chunks = 2 * cp if config.sequence.layout == "zigzag" and cp > 1 else cp
    if config.data.context % chunks != 0:
        below = config.data.context // chunks * chunks
        raise ConfigError(
            "data.context",
            config.data.context,
            f"{cp} ranks share a sequence, so the {config.sequence.layout} layout needs a multiple of {chunks}",
            f"data.context={below or chunks} or {below + chunks}, or another sequence.degree",
        )


def micro_batch(config: RunConfig) -> int:
    """Return the windows in one forward pass of one data-parallel rank.

    Raises:
        ConfigError: the ranks and their micro batches do not divide ``trainer.batch``.
    """
    trainer, dp = config.trainer, mesh_sizes(config).dp
    if trainer.batch % dp != 0:
        raise ConfigError(
            "trainer.batch",
            trainer.batch,
            f"each of {dp} data-parallel ranks takes an equal share",
            f"trainer.batch={-(-trainer.batch // dp) * dp}",
        )
    share = trainer.batch // dp
    micro = trainer.micro_batch or share
    if share % micro != 0:
        fits = [m for m in range(1, share + 1) if share % m == 0]
        raise ConfigError(
            "trainer.micro_batch", micro, f"it must divide a rank's share of the batch, {share}", f"one of {fits}, or 0"
        )
    return micro


def _batch(config: RunConfig) -> None:
    micro_batch(config)
    trainer = config.trainer
    if trainer.warmup_steps > trainer.steps:
        raise ConfigError(
            "trainer.warmup_steps",
            trainer.warmup_steps,
            f"warmup must end within trainer.steps = {trainer.steps}",
            f"trainer.warmup_steps={trainer.steps // 10}",
        )


def _cluster(config: RunConfig) -> None:
    ranks, least = config.cluster.ranks, config.cluster.min_ranks
    if least > ranks:
        raise ConfigError("cluster.min_ranks", least, f"at most cluster.ranks = {ranks}", f"cluster.min_ranks={ranks}")


def _corpus(config: RunConfig) -> None:
    data = config.data
    if data.source == "path" and not data.path:
        raise ConfigError(
            "data.path", "(empty)", "data.source=path reads your own corpus", "data.path=FILE, FOLDER or GLOB"
        )
    if data.source in ("python_docs", "digit_docs") and data.path:
        rule = f"data.source={data.source} reads what is installed here"
        raise ConfigError("data.path", data.path, rule, "add data=path")
    if data.context < 2:
        raise ConfigError("data.context", data.context, "a window predicts at least one token", "data.context=512")
    if data.vocab_size < 260 and not data.tokenizer:
        raise ConfigError(
            "data.vocab_size",
            data.vocab_size,
            "256 bytes and the special tokens need at least 260",
            "data.vocab_size=4096",
        )


def _paths(config: RunConfig) -> None:
    for key in ("name", "run_dir", "data.name", "data.dir"):
        if not str(lookup(config, key)):
            raise ConfigError(key, "(empty)", "it names a folder", f"{key}=...")
    if Path(config.run_dir).resolve() == Path(config.data.dir).resolve():
        raise ConfigError("run_dir", config.run_dir, "a run and its data need folders of their own", "another run_dir")


def check(config: RunConfig) -> RunConfig:
    """Return ``config`` unchanged, or raise the first ConfigError that it deserves."""
    for rule in (_choices, _ranges, _paths, _cluster, _corpus, _model, _sequence, _batch, _experts):
        rule(config)
    check_curation(config.curation)
    experts = bool(config.model.experts.groups)
    check_sharding(config.sharding, config.cluster.gpus_per_rank, config.trainer.objective, experts)
    check_images(config)
    check_rephrase(config.rephrase)
    check_serving(config.serve)
    return config


def flat_keys(config: object, prefix: str = "") -> list[str]:
    """Return the dotted names of all leaf fields of a dataclass tree."""
    keys = []
    for item in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, item.name)
        keys += flat_keys(value, f"{prefix}{item.name}.") if is_dataclass(value) else [prefix + item.name]
    return keys
