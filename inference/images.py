"""Images from a model of text and images: it continues a prompt with the codes of one, which become pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import DataError
from conf.serving import EngineConfig
from data.images import Pixels
from data.tokenize import IMAGE_TOKENIZER, ImageIds
from inference.engine import Engine
from inference.grammar import Matcher
from inference.params import SamplingParams
from models.image_tokenizer import load_image_tokenizer


class ImageMatcher(Matcher):
    """The form of one image: so many codes, and nothing else."""

    def __init__(self, ids: ImageIds, tokens: int, vocab_size: int) -> None:
        self._left = tokens
        self._codes = torch.zeros(vocab_size, dtype=torch.bool)
        self._codes[ids.first : ids.first + ids.codes] = True

    @property
    def complete(self) -> bool:
        return self._left == 0

    def allowed(self) -> Tensor:
        return self._codes

    def push(self, token: int) -> None:
        assert self._codes[token], f"token {token} is no code of an image"
        self._left -= 1


def generate_images(
    model_folder: str | Path, prompts: Sequence[str], params: SamplingParams, settings: EngineConfig | None = None
) -> Iterator[Pixels]:
    """One image for each prompt, [size, size, channels]: what the model puts after the prompt.

    Raises:
        DataError: the folder cannot be read, its model knows no images, or a prompt leaves no room for one.
    """
    engine = Engine(model_folder, settings)
    ids, folder = engine.tokenizer.images, Path(model_folder) / IMAGE_TOKENIZER
    if ids is None or not folder.is_dir():
        rule = "images come from a model that was trained on images"
        raise DataError("generate.model", model_folder, rule, "train on data=digits or images of your own, and export")
    images = load_image_tokenizer(folder)
    tokens = images.spec.tokens
    for prompt in prompts:
        start = [*engine.encode(prompt), ids.begin]
        if len(start) + tokens > engine.context:
            rule = f"the prompt and {tokens} tokens of an image fit in the model's context of {engine.context}"
            raise DataError("prompt", f"{len(start)} tokens", rule, "shorten the prompt")
        generation = engine.start(start, replace(params, max_tokens=tokens))
        generation.matcher = ImageMatcher(ids, tokens, engine.spec.vocab_size)
        engine.submit(generation)
        while not generation.finished:
            engine.step()
        for news in generation.news:
            if isinstance(news, Exception):
                raise news
        codes = torch.tensor(generation.tokens[len(start) :]) - ids.first
        yield images.decode(codes[None].numpy())[0]
