"""Training on images: the tokenizer from documents to its folder, resuming, ranks, and a model of text and images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import DataError
from conf.rules import check
from conf.schema import ExpertsConfig, RunConfig
from data.curate import curate
from data.loader import Loader
from data.order import order
from data.pack import pack
from data.shards import open_shards
from data.stages import serial_units, stage_folders
from data.tokenize import load_tokenizer
from models.image_tokenizer import load_image_tokenizer
from tests.distributed.training_runs import Recorder, curve
from tests.helpers.dist import run_distributed
from tests.unit.data.samples import make_config
from tests.unit.data.test_images import corpus
from trainers import pretrain
from trainers.image_tokenizer import read_pixels, run
from trainers.report import RECONSTRUCTIONS, write_report


def tokenizer_config(root: Path, name: str, **changes: Any) -> RunConfig:
    """A tiny image tokenizer of the corpus that ``root`` holds."""
    config = make_config(root, root / "c.jsonl", image_field="images", image_tokenizer=str(root / name / "images"))
    config.name, config.run_dir, config.seed = name, str(root / name / "run"), 3
    config.curation.min_chars, config.curation.max_repeated_line_fraction = 0, 1.0
    config.order.kind, config.data.context = "random", 40
    own, trainer = config.image_tokenizer, config.trainer
    own.size, own.patch, own.codes, own.width, own.code_dim, own.held_out = 8, 2, 12, 4, 3, 0.2
    trainer.objective, trainer.steps, trainer.batch, trainer.warmup_steps, trainer.lr = "images", 12, 6, 2, 5e-3
    trainer.checkpoint_every, trainer.eval_every, trainer.log_every, trainer.weight_decay = 5, 6, 5, 0.0
    for key, value in changes.items():
        setattr(trainer, key, value)
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    corpus(folder)
    curate(tokenizer_config(folder, "any"), serial_units)
    return folder


@pytest.fixture(scope="module")
def trained(root: Path) -> RunConfig:
    config = check(tokenizer_config(root, "whole"))
    assert run(config, Recorder())["status"] == "done"
    return config


def test_it_learns_and_leaves_a_folder_and_a_picture(root: Path, trained: RunConfig) -> None:
    losses = curve(trained)
    assert losses[-1] < losses[0]
    assert 0 < curve(trained, "image/codes_used")[-1] <= 1
    assert len(curve(trained, "eval/loss")) == 2
    picture = (Path(trained.run_dir) / RECONSTRUCTIONS).read_bytes()
    assert picture.startswith(b"\x89PNG")
    write_report(trained.run_dir)
    assert (Path(trained.run_dir) / "report" / RECONSTRUCTIONS).read_bytes() == picture
    found = load_image_tokenizer(trained.data.image_tokenizer)
    pixels = np.zeros((2, 8, 8, 1), dtype=np.uint8)
    assert found.decode(found.encode(pixels)).shape == pixels.shape


def test_a_resumed_run_ends_with_the_same_tokenizer(root: Path, trained: RunConfig) -> None:
    config = tokenizer_config(root, "resumed")
    assert run(config, Recorder(stop_after=7))["status"] == "stopped"
    with pytest.raises(DataError, match="trainer=image_tokenizer"):
        load_image_tokenizer(config.data.image_tokenizer)
    assert run(config, Recorder())["resumed_from"] == 7
    assert curve(config) == curve(trained)
    names = ("model.safetensors", "config.json")
    mine, whole = (Path(c.data.image_tokenizer) for c in (config, trained))
    assert all((mine / name).read_bytes() == (whole / name).read_bytes() for name in names)
    run(config, Recorder())
    assert (mine / names[0]).read_bytes() == (whole / names[0]).read_bytes(), "what is done is done"


def rank(number: int, world_size: int, config: RunConfig) -> None:
    config.cluster.ranks = world_size
    run(config, Recorder())


def test_two_ranks_learn_as_one_does(root: Path, trained: RunConfig) -> None:
    config = tokenizer_config(root, "two")
    run_distributed(rank, 2, config)
    assert curve(config) == pytest.approx(curve(trained), rel=1e-4)
    assert curve(config, "eval/loss") == pytest.approx(curve(trained, "eval/loss"), rel=1e-3)


def test_a_corpus_without_images_is_an_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "words alone"}\n')
    config = tokenizer_config(tmp_path, "none")
    curated = curate(config, serial_units)
    with pytest.raises(DataError, match="at least two images"):
        read_pixels(stage_folders(config).curated, curated, config.image_tokenizer)


def test_a_sample_is_spread_over_the_corpus(root: Path) -> None:
    config = tokenizer_config(root, "sample")
    folder, curated = stage_folders(config).curated, curate(config, serial_units)
    whole = read_pixels(folder, curated, config.image_tokenizer)
    config.image_tokenizer.sample = 10
    some = read_pixels(folder, curated, config.image_tokenizer)
    assert len(some) <= 10
    assert np.array_equal(some, whole[:: -(-len(whole) // 10)])


@pytest.fixture(scope="module")
def packed(trained: RunConfig) -> RunConfig:
    config = trained
    order(config, serial_units)
    pack(config, serial_units)
    return config


def model_config(root: Path, packed: RunConfig, name: str, groups: list[int]) -> RunConfig:
    config = tokenizer_config(root, name, objective="tokens", steps=4, batch=4, lr=1e-2, eval_windows=3)
    config.data = packed.data
    config.data.eval_fraction = 0.2
    model = config.model
    model.dim, model.layers, model.heads, model.kv_heads, model.ffn_dim = 32, 2, 4, 2, 32
    model.modalities, model.modality_tokens = ["text", "image"], [12]
    model.experts = ExpertsConfig(groups=groups)
    config.sequence.strategy = "local"
    return check(config)


@pytest.mark.parametrize("groups", [[], [2, 2]])
def test_the_loss_is_told_by_modality(root: Path, packed: RunConfig, groups: list[int]) -> None:
    config = model_config(root, packed, f"mixed{len(groups)}", groups)
    pretrain.run(config, Recorder())
    shards, ids = open_shards(stage_folders(config).packed), load_tokenizer(stage_folders(config).tokenizer).images
    assert ids is not None
    loader = Loader(shards, 4, config.seed, "context", 0.2)
    both = zip(curve(config, "train/loss_by_modality/text"), curve(config, "train/loss_by_modality/image"), strict=True)
    for step, (loss, (text, image)) in enumerate(zip(curve(config), both, strict=True)):
        labels = loader.batch(step, 0, 1).labels
        images, known = (labels >= ids.first).sum(), (labels >= 0).sum()
        assert loss == pytest.approx((text * (known - images) + image * images) / known, rel=1e-5)
    assert curve(config, "train/flops")[-1] == 4 * curve(config, "train/flops")[0]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_batches_of_one_modality_alone(
    root: Path, packed: RunConfig, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config(root, packed, f"only-{kind}", [2, 2])
    read = Loader._read

    def alone(loader: Loader, windows: Any) -> Any:
        batch = read(loader, windows)
        first = loader.shards.vocab_size - 12
        for array in (batch.tokens, batch.labels):
            array[array >= 0] = array[array >= 0] % 12 + (first if kind == "image" else 0)
        return batch

    monkeypatch.setattr(Loader, "_read", alone)
    assert pretrain.run(config, Recorder())["status"] == "done"
    other = "text" if kind == "image" else "image"
    assert len(curve(config, f"train/loss_by_modality/{kind}")) == 4
    assert curve(config, f"train/loss_by_modality/{other}") == []
    assert curve(config, f"train/loss_by_modality/{kind}") == pytest.approx(curve(config), rel=1e-6)


def test_a_model_whose_images_are_other_ids_is_refused(root: Path, packed: RunConfig) -> None:
    config = model_config(root, packed, "other", [2, 2])
    config.model.modality_tokens = [11]
    with pytest.raises(DataError, match=r"12 codes"):
        pretrain.run(config, Recorder())
