"""The one table of what is measured: names, units, how ranks are combined, which way is better.

Every number that goes to the console, to metrics.jsonl or to a tracker has a row here. Importable without torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX, SAME = "max", "same"  # over ranks; "same": every rank holds the reduced value already
MINIMIZE, MAXIMIZE, NEITHER = "minimize", "maximize", ""


@dataclass(frozen=True)
class Metric:
    """One row. A name that ends in "/" is a family: it stands for every name that starts with it."""

    name: str
    unit: str
    reduction: str
    goal: str
    description: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "train/loss", "nats/token", SAME, MINIMIZE, "mean over the step's labels; image tokenizer: squared pixel error"
    ),
    Metric("train/loss_by_modality/", "nats/token", SAME, MINIMIZE, "train/loss of labels of that modality"),
    Metric("train/flops", "FLOP", SAME, NEITHER, "FLOPs of forward and backward passes so far (conf.estimate)"),
    Metric("train/tokens", "tokens", SAME, NEITHER, "tokens of all windows trained on so far, padding included"),
    Metric("optim/lr", "", SAME, NEITHER, "learning rate of this step"),
    Metric("optim/grad_norm", "", SAME, NEITHER, "global L2 norm of the gradient before clipping"),
    Metric("throughput/tokens_per_sec", "tokens/s", SAME, MAXIMIZE, "global batch over the step's wall time"),
    Metric("throughput/mfu", "%", SAME, MAXIMIZE, "model FLOP/s over the dense bf16 peak of the ranks' GPUs"),
    Metric("time/step_sec", "s", MAX, MINIMIZE, "optimizer step: batch, forward, backward, update"),
    Metric("time/data_wait_sec", "s", MAX, MINIMIZE, "part of the step that waited for the loader"),
    Metric("time/eval_sec", "s", MAX, MINIMIZE, "evaluation after this step"),
    Metric("time/checkpoint_sec", "s", MAX, MINIMIZE, "checkpoint done before this step: copy, write, sync, rename"),
    Metric("time/checkpoint_stall_sec", "s", MAX, MINIMIZE, "time for which checkpoints held up training before it"),
    Metric("ring/exposed_comm_ms", "ms", MAX, MINIMIZE, "attention's waiting for messages in a recorded step"),
    Metric("memory/peak_gb", "GB", MAX, MINIMIZE, "peak so far: device memory on a GPU, resident memory on a CPU"),
    Metric(
        "eval/loss", "nats/token", SAME, MINIMIZE, "mean over held-out labels; image tokenizer: squared pixel error"
    ),
    Metric("eval/loss_by_position/", "nats/token", SAME, MINIMIZE, "eval/loss of labels with that much context"),
    Metric("eval/loss_by_modality/", "nats/token", SAME, MINIMIZE, "eval/loss of labels of that modality"),
    Metric("eval/loss_expert_choice", "nats/token", SAME, MINIMIZE, "held-out loss while experts see later tokens too"),
    Metric("moe/causal_gap", "nats/token", SAME, MINIMIZE, "loss without looking ahead, less eval/loss_expert_choice"),
    Metric("moe/load_imbalance/", "", SAME, MINIMIZE, "busiest expert's tokens over the mean, mean over layers"),
    Metric("moe/tokens_with_0/", "fraction", SAME, MINIMIZE, "tokens of that modality that no expert took"),
    Metric("moe/tokens_with_1/", "fraction", SAME, NEITHER, "tokens of that modality that one expert took"),
    Metric("moe/tokens_with_2_or_more/", "fraction", SAME, NEITHER, "tokens of that modality that several took"),
    Metric("moe/auxiliary_accuracy", "fraction", SAME, MAXIMIZE, "decisions on which auxiliary routers are right"),
    Metric("moe/auxiliary_load", "", SAME, NEITHER, "tokens that auxiliary routers take over those experts chose"),
    Metric("image/codes_used", "fraction", SAME, MAXIMIZE, "codes of the image tokenizer that are in use"),
    Metric("image/commitment", "", SAME, MINIMIZE, "mean squared distance of the encoder's vectors from their codes"),
    Metric("system/memory_gb/", "GB", SAME, MINIMIZE, "resident memory of that rank's process"),
    Metric("system/cpu_percent/", "%", SAME, NEITHER, "processor time of that rank's process over wall time"),
    Metric("data/neighbour_similarity", "cosine", SAME, NEITHER, "mean similarity of documents next to each other"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def find(name: str) -> Metric:
    """Return the row of ``name``, or of the family that it belongs to.

    Raises:
        KeyError: the table has no such row: whoever measures something new adds one.
    """
    found = _BY_NAME.get(name)
    if found is None:
        found = next((metric for metric in METRICS if metric.name.endswith("/") and name.startswith(metric.name)), None)
    if found is None:
        raise KeyError(f"metric {name!r} has no row in trainers.metrics.METRICS")
    return found


def checked(values: Mapping[str, float]) -> dict[str, float]:
    """Return a copy of ``values`` after looking every name up in the table."""
    for name in values:
        find(name)
    return {name: float(value) for name, value in values.items()}


def reduced_by(reduction: str, names: Iterable[str]) -> list[str]:
    """Return those of ``names``, sorted, that are combined over ranks by ``reduction``."""
    return sorted(name for name in names if find(name).reduction == reduction)


def position_buckets(context: int, first: int = 64) -> list[tuple[int, int]]:
    """Split the positions 0..context-1 into buckets [start, end) whose ends double: 64, 128, 256 and so on.

    A model that uses its context has a lower loss in later buckets; equal widths would hide where that begins.
    """
    buckets, start, end = [], 0, min(first, context)
    while start < context:
        buckets.append((start, end))
        start, end = end, min(2 * end, context)
    return buckets


def bucket_name(start: int, end: int) -> str:
    """Return the metric name of a bucket of positions, such as ``eval/loss_by_position/64-127``."""
    return f"eval/loss_by_position/{start}-{end - 1}"
