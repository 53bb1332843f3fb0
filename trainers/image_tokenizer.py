"""Training of the image tokenizer as one rank does it: ``sundog train trainer=image_tokenizer``.

All ranks are data parallel. Batches are a function of (seed, step), as the decoder's are.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from conf.errors import ConfigError, DataError
from conf.images import ImageTokenizerConfig, check_image_training
from conf.rules import MeshSizes
from conf.schema import RunConfig
from data.documents import read_batches
from data.files import canonical_json, write_atomic
from data.images import ImageSpec, grid, marked_images, pixels_of, png
from data.manifest import Manifest, read_manifest
from data.permutation import in_epochs, permute
from data.stages import stage_folders
from models.image_tokenizer import VectorQuantised, save_image_tokenizer, to_tensor
from parallel.apply import unwrap
from parallel.ddp import replicate_parameters
from parallel.gradients import clip_grad_norm
from parallel.mesh import Mesh, build_mesh
from trainers.checkpoint import Checkpoints
from trainers.checkpoint_folder import checkpoints_folder
from trainers.console import short_number
from trainers.control import Control
from trainers.loop import Parts, train
from trainers.observer import Observer
from trainers.optim import build_optimizer, set_learning_rate
from trainers.report import RECONSTRUCTIONS
from trainers.runtime import Runtime, process_group
from trainers.schedule import learning_rate
from trainers.state import StateWriter, TrainState
from trainers.throughput import Meter
from trainers.tracking import require_tracker, run_id

SHOWN, COLUMNS = 24, 12
HELD_OUT_KEY = 0x1A6E
Pixels = npt.NDArray[np.uint8]  # [images, size, size, channels]


def run(config: RunConfig, control: Control) -> dict[str, Any]:
    """Train the image tokenizer from its newest checkpoint; when done, write it to ``data.image_tokenizer``.

    Every rank calls it; collective throughout. Returns what ``trainers.loop.train`` does; ``tokens`` are images.

    Raises:
        SundogError: config, data, checkpoint or disk are at fault.
    """
    require_tracker(config)
    check_image_training(config)
    own, folders = config.image_tokenizer, stage_folders(config)
    curated = read_manifest(folders.curated, command="curate")
    with process_group(config) as runtime, Observer(config, control, runtime) as observer:
        mesh = build_mesh(MeshSizes(config.cluster.ranks, 1, 1), runtime.device.type)
        pixels = read_pixels(folders.curated, curated, own)
        spec = ImageSpec(own.kind, own.size, own.channels, own.patch, own.codes, own.width, own.code_dim)
        model = replicate_parameters(VectorQuantised(spec).initialise(config.seed).to(runtime.device), mesh)
        optimizer = build_optimizer(model, config.trainer)
        origin = {
            "model": asdict(spec),
            "documents": curated.fingerprint,
            "stream": {"seed": config.seed, "trainer.batch": config.trainer.batch, "images": len(pixels)},
        }
        checkpoints = Checkpoints(
            checkpoints_folder(config.run_dir), config.trainer.keep_checkpoints, runtime.checkpoint_group, observer.log
        )
        restored = checkpoints.restore(model, optimizer, origin)
        state = TrainState.from_json(restored) if restored else TrainState()
        if runtime.rank == 0:
            state.run_id = run_id(Path(config.run_dir), state.run_id)
        observer.start(state.run_id, state.step)
        task = ImageTask(config, runtime, model, optimizer, mesh, pixels)
        count = short_number(sum(p.numel() for p in model.parameters()))
        observer.log(
            f"image tokenizer {count} parameters, {spec.tokens} tokens of {spec.codes} an image, {task.summary}"
        )
        dist.barrier(group=runtime.io_group)
        writer = StateWriter(config, origin, runtime.world_size)
        parts = Parts(task, model, optimizer, checkpoints, observer, Meter(config, None, runtime), writer)
        result = train(config, control, runtime, parts, state)
        if result["status"] == "done" and runtime.rank == 0:
            notes = {
                "sundog.json": canonical_json({"identity": origin, "step": result["step"], "mse": state.eval_loss})
            }
            observer.log(f"image tokenizer in {save_image_tokenizer(task.plain, config.data.image_tokenizer, notes)}")
        return result


def read_pixels(folder: Path, curated: Manifest, own: ImageTokenizerConfig) -> Pixels:
    """The corpus' images, evenly sampled down to ``sample`` of them, as [images, size, size, channels].

    Raises:
        DataError: there are fewer than two.
    """
    images = sum(len(found) for found in _images(folder, curated))
    step = max(1, -(-images // own.sample))
    chosen: list[Pixels] = []
    place = 0
    for found in _images(folder, curated):
        picked = [image for number, image in enumerate(found) if (place + number) % step == 0]
        chosen += [pixels_of(image, own.size, own.channels) for image in picked]
        place += len(found)
    if len(chosen) < 2:
        rule = "at least two images are needed, one of them held out"
        fix = "a corpus with images: data=digits, or data.image_field"
        raise DataError(str(folder), f"{len(chosen)} images", rule, fix)
    return np.stack(chosen)


def _images(folder: Path, curated: Manifest) -> Iterator[list[bytes]]:
    for part in curated.figures["parts"]:
        for batch in read_batches(folder / part["file"], ["text", "images"]):
            yield list(marked_images(batch.column(0).to_pylist(), batch.column(1).to_pylist()).values())


@dataclass(frozen=True)
class ImageTask:
    """Learning to restore images from their codes (``loop.Task``)."""

    config: RunConfig
    runtime: Runtime
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    mesh: Mesh
    pixels: Pixels

    @property
    def step_tokens(self) -> int:
        """Images of a step."""
        return self.config.trainer.batch

    @property
    def held_out(self) -> int:
        """Images that judge, the last ones of a fixed permutation."""
        return min(max(1, round(len(self.pixels) * self.config.image_tokenizer.held_out)), len(self.pixels) - 1)

    @property
    def plain(self) -> VectorQuantised:
        model = unwrap(self.model)
        assert isinstance(model, VectorQuantised)
        return model

    @property
    def summary(self) -> str:
        return f"{len(self.pixels) - self.held_out:,} images and {self.held_out:,} held out"

    def batch(self, step: int) -> Pixels:
        rows = self.config.trainer.batch // self.mesh.dp_size
        positions = step * self.config.trainer.batch + self.mesh.dp_rank * rows + np.arange(rows)
        chosen = in_epochs(positions, len(self.pixels) - self.held_out, self.config.seed)
        return self.pixels[permute(chosen, len(self.pixels), HELD_OUT_KEY)]

    def step(self, batch: Pixels, step: int) -> dict[str, float]:
        trainer, own = self.config.trainer, self.config.image_tokenizer
        self.model.train()
        error, commitment = self.model(to_tensor(batch).to(self.runtime.device))
        (error + own.commitment * commitment).backward()
        norm = float(clip_grad_norm(self.model, trainer.clip or math.inf, self.mesh))
        means = torch.stack([error.detach(), commitment.detach()])
        dist.all_reduce(means)
        loss, distance = (means / self.mesh.dp_size).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rule = f"loss and gradient must stay finite; step {step + 1} has loss {loss} and norm {norm}"
            raise ConfigError("trainer.lr", trainer.lr, rule, "a lower trainer.lr; earlier checkpoints are intact")
        rate = learning_rate(step, trainer)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator("cpu").manual_seed(self.config.seed * 1_000_003 + step)
        used = self.plain.codebook.move(own.decay, own.restart_below if step else 1.0, generator)
        return {
            "train/loss": loss,
            "optim/lr": rate,
            "optim/grad_norm": norm,
            "image/codes_used": used,
            "image/commitment": distance,
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """The held-out squared error; every rank computes the same. The first of them are drawn."""
        first = len(self.pixels) - self.held_out
        judged = self.pixels[permute(np.arange(first, len(self.pixels)), len(self.pixels), HELD_OUT_KEY)]
        model = self.plain.eval()
        restored = model.decode(model.encode(judged))
        if self.runtime.rank == 0:
            pairs = [image for pair in zip(judged[:SHOWN], restored[:SHOWN], strict=True) for image in pair]
            write_atomic(Path(self.config.run_dir) / RECONSTRUCTIONS, png(grid(pairs, COLUMNS)))
        error = np.square((restored.astype(np.float64) - judged) / 255).mean()
        return {"eval/loss": float(error)}
