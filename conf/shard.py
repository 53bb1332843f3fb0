"""Data parallelism of a run: how parameters, gradients and optimizer state lie on the ranks."""

from dataclasses import dataclass

from conf.errors import ConfigError

FSDP = ("fsdp", "hsdp")  # torch's FSDP2
ZERO = ("zero1", "zero2", "zero3")  # DeepSpeed's ZeRO; the number is its stage
KINDS = ("ddp", *FSDP, *ZERO)
CHOICES = {"sharding.kind": KINDS, "sharding.offload": ("none", "optimizer", "all")}


@dataclass
class ShardingConfig:
    """The ranks that sequence parallelism leaves over are spread over these axes."""

    kind: str = "ddp"
    dp_replicate: int = 0  # 0: what is left over (ddp), 2 (hsdp), or 1
    dp_shard: int = 0  # 0: what is left over, or 1 (ddp)
    expert_degree: int = 1  # ranks over which the experts of every group are spread; they hold neighbouring parts
    offload: str = "none"  # to CPU memory: optimizer: its state and its step (zero1 to 3); all: parameters too


def least_data_parallel(sharding: ShardingConfig) -> int:
    """Return how many groups of ranks read different windows at least, by what is set."""
    return max(sharding.dp_replicate, 2 if sharding.kind == "hsdp" else 1) * max(sharding.dp_shard, 1)


def data_parallel(sharding: ShardingConfig, rest: int) -> tuple[int, int]:
    """Return (dp_replicate, dp_shard) for ``rest`` groups of ranks that read different windows.

    Raises:
        ConfigError: the kind of sharding has no such axis.
    """
    kind, replicate, shard = sharding.kind, sharding.dp_replicate, sharding.dp_shard
    if kind == "ddp":
        if shard > 1:
            raise ConfigError("sharding.dp_shard", shard, "ddp keeps whole parameters on every rank", "sharding=fsdp")
        return replicate or rest, 1
    if kind == "hsdp":
        if replicate == 1:
            rule = "hsdp keeps at least two replicas, each of them sharded"
            raise ConfigError("sharding.dp_replicate", replicate, rule, "sharding=fsdp, or sharding.dp_replicate=2")
        replicate = replicate or max(rest // shard, 2) if shard else replicate or 2
        return replicate, shard or max(rest // replicate, 1)
    if replicate > 1:
        fix = "sharding=hsdp" if kind == "fsdp" else "sharding=hsdp (FSDP2), or sharding.dp_replicate=0"
        raise ConfigError("sharding.dp_replicate", replicate, f"{kind} shards over all ranks", fix)
    return 1, shard or rest


def check_sharding(sharding: ShardingConfig, gpus_per_rank: float, objective: str, experts: bool) -> None:
    """Check what needs no number of ranks.

    Raises:
        ConfigError: the kind of sharding cannot do what is asked for.
    """
    kind, offload = sharding.kind, sharding.offload
    able = {"ddp": ("none",), "zero1": ("none", "optimizer"), "zero2": ("none", "optimizer")}
    able |= {"zero3": ("none", "optimizer", "all"), "fsdp": ("none", "all"), "hsdp": ("none", "all")}
    if offload not in able[kind]:
        rule = f"sharding={kind} knows {', '.join(able[kind])}"
        raise ConfigError("sharding.offload", offload, rule, f"sharding.offload={able[kind][-1]}, or another sharding")
    if offload == "all" and kind in FSDP and gpus_per_rank == 0:
        rule = "FSDP2 offloads from an accelerator; on CPU ranks everything is in CPU memory already"
        raise ConfigError("sharding.offload", offload, rule, "sharding.offload=none, or cluster.gpus_per_rank=1")
    if kind in ZERO and objective != "tokens":
        rule = f"{kind} trains a language model's parameters, all of them"
        raise ConfigError("trainer.objective", objective, rule, "sharding=fsdp")
    if kind == "zero3" and experts:
        rule = "zero3 gathers a layer's parameters when the layer runs, which ranks must do alike; experts do not"
        raise ConfigError("sharding.kind", kind, rule, "sharding=fsdp or zero2")
