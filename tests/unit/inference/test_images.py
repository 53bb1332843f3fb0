"""Images from a model: always whole, the codes that the model prefers, errors where there is no room or no image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import EXIT_DONE, ConfigError, DataError
from data.images import open_image
from data.tokenize import add_images, load_tokenizer, train_tokenizer
from inference.engine import Engine
from inference.images import generate_images
from inference.params import SamplingParams
from launch.generate import main
from models.decoder import Decoder, ModelSpec
from models.hf import load_hf, save_hf
from models.image_tokenizer import load_image_tokenizer, save_image_tokenizer
from models.spec import ExpertSpec
from tests.unit.inference.builders import TEXT
from tests.unit.models.images import SPEC
from tests.unit.models.test_image_tokenizer import ready


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of text and images with experts for both, exported with both tokenizers."""
    root = tmp_path_factory.mktemp("images")
    save_image_tokenizer(ready(), root / "image_tokenizer")
    train_tokenizer([TEXT], 270, root / "tokenizer")
    add_images(root / "tokenizer", root / "image_tokenizer", SPEC.codes)
    vocab = load_tokenizer(root / "tokenizer").vocab_size
    kinds = {"modalities": ("text", "image"), "modality_tokens": (SPEC.codes,)}
    spec = ModelSpec(vocab, 32, 2, 4, 2, 8, 64, init_std=0.3, context=64, experts=ExpertSpec((2, 2)), **kinds)
    return save_hf(Decoder(spec).initialise(0), root / "model", root / "tokenizer")


def test_greedy_images_are_what_the_model_prefers(folder: Path) -> None:
    greedy = SamplingParams(temperature=0.0)
    found = list(generate_images(folder, ["the cat", "a"], greedy))
    model, engine = load_hf(folder).eval(), Engine(folder)
    ids = engine.tokenizer.images
    assert ids is not None
    for prompt, pixels in zip(("the cat", "a"), found, strict=True):
        tokens = [*engine.encode(prompt), ids.begin]
        for _ in range(SPEC.tokens):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1]
            tokens.append(ids.first + int(logits[ids.first : ids.first + ids.codes].argmax()))
        codes = np.array(tokens[-SPEC.tokens :]) - ids.first
        expected = load_image_tokenizer(folder / "image_tokenizer").decode(codes[None])[0]
        assert np.array_equal(pixels, expected)


def test_seeds_decide_sampled_images(folder: Path) -> None:
    one, again, other = (
        next(generate_images(folder, ["the"], SamplingParams(temperature=2.0, seed=seed))) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.shape == (SPEC.size, SPEC.size, 1)


def test_a_prompt_without_room_for_an_image_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="16 tokens of an image fit"):
        next(generate_images(folder, ["the cat sat " * 20], SamplingParams()))


def test_a_model_of_text_alone_has_no_images(model_folder: Path) -> None:
    with pytest.raises(DataError, match="trained on images"):
        next(generate_images(model_folder, ["the"], SamplingParams()))


def test_the_command_writes_png_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "cat.png"
    arguments = ["--prompt", "the cat", "--prompt", "a", "--image", str(target), f"generate.model='{folder}'"]
    assert main("generate", arguments) == EXIT_DONE
    for file in (target, target.with_stem("cat-2")):
        assert open_image(file.read_bytes()).size == (SPEC.size, SPEC.size)
        assert str(file) in capsys.readouterr().out or file != target
    with pytest.raises(ConfigError, match="PNG"):
        main("generate", ["--prompt", "a", "--image", "a.jpg"])
    with pytest.raises(ConfigError, match="not together"):
        main("generate", ["--input", "x.jsonl", "--image", "a.png"])
