"""Pretraining as one rank does it: ``run`` reads as the algorithm.

Ranks are started by Ray actors (``cluster``), by torchrun or by a test; this module knows of none of them::

    python -m torch.distributed.run --nproc_per_node 2 -m trainers.pretrain --config RUN_DIR/config.yaml
"""

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from conf.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DataError, SundogError
from conf.rules import check, mesh_sizes
from conf.schema import RunConfig
from data.loader import Ints, Loader
from data.shards import Shards, open_shards
from data.stages import stage_folders
from data.tokenize import Tokenizer, load_tokenizer
from models.decoder import Decoder, ModelSpec
from models.hf import load_hf
from models.moe.upcycle import add_auxiliary, upcycle
from parallel.apply import parallelize, take_optimizer
from parallel.mesh import Mesh, build_mesh
from parallel.ring.trace import recording
from trainers import console
from trainers.checkpoint import Checkpoints
from trainers.checkpoint_folder import checkpoints_folder
from trainers.control import Control, LocalControl
from trainers.evaluate import evaluate
from trainers.experts import freeze_all_but_auxiliary
from trainers.lineage import changed_keys, training_part
from trainers.loop import Parts, due, train
from trainers.observer import Observer
from trainers.optim import build_optimizer
from trainers.runtime import Runtime, process_group
from trainers.samples import continue_held_out
from trainers.sequence import resolve_sequence
from trainers.state import StateWriter, TrainState, identity
from trainers.step import to_local, train_step
from trainers.throughput import Meter
from trainers.timeline import exposed, save_timeline
from trainers.tracking import require_tracker, run_id


@dataclass(frozen=True)
class Corpus:
    """The packed data of a run."""

    shards: Shards
    tokenizer: Tokenizer
    loader: Loader


def run(config: RunConfig, control: Control) -> dict[str, Any]:
    """Train as ``config`` says, from the newest checkpoint if there is one, until the last step or until told to stop.

    Every rank calls it; collective throughout. Returns what ``trainers.loop.train`` does.

    Raises:
        SundogError: config, data, checkpoint or disk are at fault; see the functions called here.
    """
    require_tracker(config)
    with process_group(config) as runtime, Observer(config, control, runtime) as observer:
        mesh = build_mesh(mesh_sizes(config), runtime.device.type)
        config, choice = resolve_sequence(config, mesh, runtime.device)
        corpus = open_corpus(config)
        model, spec = build_model(config, corpus.tokenizer)
        check_modalities(spec, corpus.tokenizer)
        model = parallelize(model.to(runtime.device), mesh, config)
        optimizer = build_optimizer(model, config.trainer)
        model = take_optimizer(model, optimizer, mesh, config)

        origin = identity(config, spec.to_dict(), corpus.tokenizer.digest, corpus.shards.fingerprint)
        folder = checkpoints_folder(config.run_dir)
        checkpoints = Checkpoints(folder, config.trainer.keep_checkpoints, runtime.checkpoint_group, observer.log)
        restored = checkpoints.restore(model, optimizer, origin)
        state = TrainState.from_json(restored) if restored else TrainState()
        if runtime.rank == 0:
            state.run_id = run_id(Path(config.run_dir), state.run_id)
        observer.start(state.run_id, state.step)
        observer.log(_summary(config, spec, mesh, corpus, state))
        if choice:
            observer.log(choice)
        _report_changes(observer, config, restored)
        dist.barrier(group=runtime.io_group)  # starting a tracker may take longer than a collective may wait

        writer = StateWriter(config, origin, runtime.world_size)
        task = TokenTask(config, runtime, model, optimizer, mesh, corpus, observer)
        parts = Parts(task, model, optimizer, checkpoints, observer, Meter(config, spec, runtime), writer)
        return train(config, control, runtime, parts, state)


@dataclass(frozen=True)
class TokenTask:
    """Learning to predict the next token (``loop.Task``)."""

    config: RunConfig
    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mesh: Mesh
    corpus: Corpus
    observer: Observer

    @property
    def step_tokens(self) -> int:
        return self.config.trainer.batch * self.config.data.context

    def batch(self, step: int) -> dict[str, Ints]:
        return self.corpus.loader.batch(step, self.mesh.dp_rank, self.mesh.dp_size).arrays()

    def step(self, batch: dict[str, Ints], step: int) -> dict[str, float]:
        config, mesh = self.config, self.mesh
        local = to_local(batch, mesh, config.sequence.layout, self.runtime.device)
        traced = config.sequence.trace_every if mesh.cp_size > 1 else 0
        with recording() if due(step + 1, traced, 0) else nullcontext() as recorder:
            result = train_step(self.model, self.optimizer, local, step, mesh, config)
        values = _similarity(self.corpus.shards) if step == 0 else {}
        if recorder is not None:
            values |= exposed(recorder)
            save_timeline(recorder, config.run_dir, step + 1, mesh)
        return values | result.metrics()

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics; a few continuations are shown."""
        arguments = self.model, self.corpus.loader, self.mesh, self.config, self.runtime.device
        values = evaluate(*arguments)
        self.observer.samples(step, *continue_held_out(*arguments), self.corpus.tokenizer)
        return values


def open_corpus(config: RunConfig) -> Corpus:
    """Open shards, tokenizer and loader.

    Raises:
        DataError: they are missing or damaged, do not belong together, or hold windows of another length.
    """
    folders = stage_folders(config)
    shards, tokenizer = open_shards(folders.packed), load_tokenizer(folders.tokenizer)
    shards.require_tokenizer(tokenizer.digest)
    data = config.data
    if shards.context != data.context:
        raise DataError(
            str(folders.packed),
            f"windows of {shards.context} tokens",
            f"data.context = {data.context} tokens are trained on",
            f"data.context={shards.context}, or `sundog pack` with this config",
        )
    loader = Loader(shards, config.trainer.batch, config.seed, data.attention, data.eval_fraction, data.positions)
    return Corpus(shards, tokenizer, loader)


def build_model(config: RunConfig, tokenizer: Tokenizer) -> tuple[Decoder, ModelSpec]:
    """Return the model with fp32 weights, equal on every rank, before sharding: from the seed or ``init_from``.

    Raises:
        DataError: the vocabulary of ``trainer.init_from`` does not fit the tokenizer of the data.
    """
    source = config.trainer.init_from
    if not source:
        spec = ModelSpec.from_config(config.model, tokenizer.vocab_size, config.data.context)
        return Decoder(spec).initialise(config.seed), spec
    model = load_hf(source).float()
    if config.trainer.upcycle_steps:
        wanted = ModelSpec.from_config(config.model, model.spec.vocab_size, model.spec.context)
        model = upcycle(model, wanted.experts, config.seed)
    if config.trainer.objective == "routers":
        model = add_auxiliary(model, config.seed)
        freeze_all_but_auxiliary(model)
    spec = replace(model.spec, context=max(model.spec.context, config.data.context))
    model.spec = spec
    if spec.vocab_size < tokenizer.vocab_size:
        raise DataError(
            "trainer.init_from",
            f"{source} with {spec.vocab_size} tokens",
            f"its vocabulary must hold that of the data's tokenizer, {tokenizer.vocab_size} tokens",
            "pack the data with the tokenizer of that model: data.tokenizer=FOLDER",
        )
    return model, spec


def check_modalities(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Raises DataError where the model's modalities do not divide the vocabulary where its images begin."""
    images = tokenizer.images
    if images is None or len(spec.modalities) == 1 or spec.modality_starts == (images.first,):
        return
    raise DataError(
        "model.modality_tokens",
        list(spec.modality_tokens),
        f"the vocabulary of the data ends with the {images.codes} codes of its images",
        f"model.modalities=[text,image] model.modality_tokens=[{images.codes}]",
    )


def _similarity(shards: Shards) -> dict[str, float]:
    """The order stage's measure of how alike neighbouring documents are, where it recorded one."""
    figures = (entry.get("figures", {}) for entry in shards.manifest.lineage)
    found = next((f["adjacent_similarity"] for f in figures if "adjacent_similarity" in f), None)
    return {} if found is None else {"data/neighbour_similarity": float(found)}


def _summary(config: RunConfig, spec: ModelSpec, mesh: Mesh, corpus: Corpus, state: TrainState) -> str:
    start = f"resuming after step {state.step}" if state.step else "from step 0"
    source = f" (weights and sizes of {config.trainer.init_from})" if config.trainer.init_from else ""
    loader = corpus.loader
    return (
        f"train {console.short_number(spec.parameters())} parameters{source}, "
        f"{mesh.dp_size} dp x {mesh.cp_size} cp ranks, sharding={config.sharding.kind}, "
        f"sequence={config.sequence.strategy}, {loader.train_windows} windows of {config.data.context} tokens "
        f"and {loader.eval_windows} held out, {start}"
    )


def _report_changes(observer: Observer, config: RunConfig, restored: dict[str, Any] | None) -> None:
    before = training_part(restored["config"] if restored else asdict(config))
    if changes := changed_keys(before, training_part(asdict(config))):
        observer.log("config changed since the checkpoint: " + "; ".join(changes))


def load_config(path: Path) -> RunConfig:
    """Read a resolved config.yaml without Hydra; ``cluster.ranks`` becomes WORLD_SIZE where that is set.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a wrong value.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
        config = cast(RunConfig, OmegaConf.to_object(merged))
    except (OSError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError("--config", path, " ".join(str(error).split()), "a config.yaml of a run folder") from error
    config.cluster.ranks = int(os.environ.get("WORLD_SIZE", config.cluster.ranks))
    return check(config)


def main(arguments: list[str] | None = None) -> int:
    """Train under torchrun, or alone; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain", description="One rank's training.")
    parser.add_argument("--config", type=Path, required=True, help="resolved YAML, as in a run folder")
    path = parser.parse_args(arguments).config
    try:
        with LocalControl() as control:
            result = run(load_config(path), control)
    except SundogError as error:
        console.complain(str(error))
        return error.exit_code
    if result["status"] == "stopped":
        if os.environ.get("RANK", "0") == "0":
            console.complain(
                f"stopped at step {result['step']}, checkpoint written; the same command goes on from there"
            )
        return EXIT_STOPPED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
