"""Our training step beside that of Hugging Face Trainer or LitGPT, step by step in one process.

    python -m benchmarks.training [--quick] [--litgpt] [--json FILE]

Both train the same Llama model (the weights of one are copied into the other) on the same windows in fp32 with the same
number of threads, AdamW (fused) and clipping. Trainer runs its own loop; after each of its steps ours does one, so both
see the same machine. A step is everything between two steps: batch, forward, backward, clipping, update, records.
``--quick``: the smaller model alone, fewer steps.
"""

import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.beside import Beside
from benchmarks.table import Row, arguments, median_ratio, report
from conf.rules import mesh_sizes
from conf.schema import RunConfig
from data.stages import stage_folders
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf
from parallel.mesh import build_mesh
from tests.distributed.training_runs import documents, make_config, make_data
from trainers.cancel import agree
from trainers.control import LocalControl
from trainers.observer import Observer
from trainers.optim import build_optimizer
from trainers.pretrain import TokenTask, open_corpus
from trainers.runtime import process_group
from trainers.throughput import Meter

WARM_UP = 2  # steps that are not counted
LR = 3e-4  # without warm-up, which the peers do otherwise: small enough that the first steps diverge for none
Windows = Sequence[tuple[torch.Tensor, torch.Tensor]]  # tokens, and labels a place later than the loader has them
Peer = Callable[[Decoder, RunConfig, Windows, Beside, Path], tuple[str, list[float]]]


@dataclass(frozen=True)
class Case:
    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    batch: int
    threads: int


QUICK = [Case("4 x 256, vocabulary 4k", 256, 4, 8, 4, 4096, 256, 8, 1)]
FULL = [*QUICK, Case("8 x 512, vocabulary 32k", 512, 8, 8, 4, 32_000, 512, 4, 2)]


class _Turns(TrainerCallback):
    """Tells of Trainer's steps."""

    def __init__(self, beside: Beside) -> None:
        self._beside = beside

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._beside.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._beside.turn()


def _config(case: Case, root: Path, steps: int) -> RunConfig:
    config = make_config(root, "ours", trainer__steps=steps, trainer__batch=case.batch, trainer__micro_batch=0)
    config.data.context, config.data.vocab_size, config.trainer.lr = case.context, case.vocab, LR
    model = config.model
    model.dim, model.layers, model.heads, model.kv_heads = case.dim, case.layers, case.heads, case.kv_heads
    config.trainer.warmup_steps, config.trainer.min_lr_fraction = 0, 1.0
    config.cluster.threads_per_rank = case.threads
    return config


def windows(loader: Any, steps: int) -> Windows:
    """What our loader gives out, in its order."""
    batches = [loader.batch(step, 0, 1).arrays() for step in range(steps)]
    return [
        (torch.from_numpy(tokens), torch.from_numpy(labels).roll(1))
        for arrays in batches
        for tokens, labels in zip(arrays["tokens"], arrays["labels"], strict=True)
    ]


class _Dataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, rows: Windows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, labels = self._rows[index]
        return {"input_ids": tokens, "labels": labels}


def _trainer(model: Decoder, config: RunConfig, rows: Windows, beside: Beside, root: Path) -> tuple[str, list[float]]:
    """Let Trainer train a copy of ``model`` on the windows; returns its name and the losses of its steps."""
    folder = save_hf(model, str(root / "hf"), stage_folders(config).tokenizer, "fp32")
    same = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    same.config.use_cache = False
    trainer = config.trainer
    settings = TrainingArguments(
        output_dir=str(root / "peer"),
        per_device_train_batch_size=trainer.batch,
        max_steps=trainer.steps,
        learning_rate=trainer.lr,
        lr_scheduler_type="constant",
        adam_beta1=trainer.beta1,
        adam_beta2=trainer.beta2,
        weight_decay=trainer.weight_decay,
        max_grad_norm=trainer.clip,
        optim="adamw_torch_fused",
        logging_steps=1,
        log_level="error",
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    peer = Trainer(model=same, args=settings, train_dataset=_Dataset(rows), callbacks=[_Turns(beside)])
    peer.train()
    losses = [entry["loss"] for entry in peer.state.log_history if "loss" in entry]
    return f"Trainer of transformers {transformers.__version__}", losses


def _measure(case: Case, steps: int, root: Path, peer: Peer) -> list[Row]:
    config = _config(case, root, steps + WARM_UP)
    make_data(config, documents(case.batch * case.context * (steps + WARM_UP) // 50 + 400))
    with process_group(config) as runtime, Observer(config, LocalControl(quiet=True), runtime) as observer:
        mesh = build_mesh(mesh_sizes(config), "cpu")
        corpus = open_corpus(config)
        spec = ModelSpec.from_config(config.model, case.vocab, case.context)
        model = Decoder(spec).initialise(config.seed)
        observer.start("benchmark", 0)
        optimizer = build_optimizer(model, config.trainer)
        task = TokenTask(config, runtime, model, optimizer, mesh, corpus, observer)
        beside = Beside(_our_step(task, Meter(config, spec, runtime)))
        rows = windows(corpus.loader, config.trainer.steps)
        peer_name, peer_losses = peer(model, config, rows, beside, root)
    assert abs(beside.losses[0] - peer_losses[0]) < 0.02 * peer_losses[0], "both train the same model on the same text"
    assert abs(beside.losses[-1] - peer_losses[-1]) < 0.05 * peer_losses[-1], "and learn alike"
    name = f"{case.name}, {case.batch} x {case.context}, {case.threads} threads"
    times = {"tokens/s": (beside.ours.wall, beside.peer.wall)}
    times["tokens per CPU second"] = (beside.ours.cpu, beside.peer.cpu)
    found = []
    for metric, both in times.items():
        ours, theirs = (seconds[WARM_UP:] for seconds in both)
        tokens, ratio = case.batch * case.context, median_ratio(ours, theirs)
        mine, other = (tokens / statistics.median(seconds) for seconds in (ours, theirs))
        found.append(Row(name, metric, mine, other, peer_name, ratio))
    return found


def _our_step(task: TokenTask, meter: Meter) -> Callable[[], float]:
    """What the loop of ``trainers.loop`` does in a step; returns its loss."""
    done = [0]

    def step() -> float:
        meter.start()
        batch = task.batch(done[0])
        meter.data_is_here()
        values = task.step(batch, done[0])
        done[0] += 1
        values |= meter.stop(task.step_tokens, done[0] * task.step_tokens)
        task.observer.step(done[0], values)
        agree(False, False, task.runtime.device)
        return values["train/loss"]

    return step


def main() -> None:
    chosen = arguments("Our training step beside Hugging Face Trainer's.", litgpt="beside LitGPT's loop instead")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    peer: Peer = _trainer
    if chosen.litgpt:
        from benchmarks.litgpt_peer import train as peer
    for case in QUICK if chosen.quick else FULL:
        with tempfile.TemporaryDirectory() as folder:
            rows += _measure(case, 10 if chosen.quick else 12, Path(folder), peer)
    report(rows, chosen.json, "Whole training steps, fp32, one process; ratios are medians over pairs of steps")


if __name__ == "__main__":
    main()
