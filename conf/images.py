"""The typed schema of the image tokenizer: an autoencoder that turns images into tokens of one vocabulary."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import ConfigError

if TYPE_CHECKING:
    from conf.schema import RunConfig

IMAGES = "images"  # trainer.objective of the image tokenizer
CHOICES = {"image_tokenizer.kind": ("vq",)}


@dataclass
class ImageTokenizerConfig:
    """A vector-quantised autoencoder (arXiv 1711.00937); `sundog train trainer=image_tokenizer` trains it."""

    kind: str = "vq"
    size: int = 28  # pixels along each side of an image; others are scaled and cropped to it
    channels: int = 1  # 1: luminance, 3: RGB
    patch: int = 4  # pixels along each side of the square that a token stands for, a power of two
    codes: int = 256  # of the codebook
    width: int = 32  # channels of the networks
    code_dim: int = 16
    commitment: float = 0.25  # weight of the encoder's distance from its codes
    decay: float = 0.98  # of the codebook's moving means, a step
    restart_below: float = 0.1  # share of the mean use under which a code is moved to where vectors are
    sample: int = 50_000  # images of the corpus that it is trained on, at most
    held_out: float = 0.05  # share of them that it is judged by


def check_images(config: "RunConfig") -> None:
    """Raises ConfigError for sizes that do not fit, or a corpus with images that has no tokenizer for them."""
    own, data = config.image_tokenizer, config.data
    if own.patch & (own.patch - 1) or own.size % own.patch:
        rule = f"a power of two that divides image_tokenizer.size = {own.size}"
        raise ConfigError("image_tokenizer.patch", own.patch, rule, f"image_tokenizer.patch={own.size & -own.size}")
    if own.channels not in (1, 3):
        raise ConfigError("image_tokenizer.channels", own.channels, "1 or 3", "image_tokenizer.channels=3")
    if not 0 < own.held_out < 1:
        rule = "a share between 0 and 1: some images train it, some judge it"
        raise ConfigError("image_tokenizer.held_out", own.held_out, rule, "image_tokenizer.held_out=0.05")
    if (data.source == "digit_docs" or data.image_field) and not data.image_tokenizer:
        rule = "images become tokens by an image tokenizer"
        fix = "data.image_tokenizer=FOLDER, where `sundog train trainer=image_tokenizer` puts it"
        raise ConfigError("data.image_tokenizer", "(empty)", rule, fix)


def check_image_training(config: "RunConfig") -> None:
    """Raises ConfigError where an image tokenizer is to be trained and there are no images, or no folder for it."""
    data, trainer, ranks = config.data, config.trainer, config.cluster.ranks
    if not data.image_tokenizer:
        rule = "a corpus of images, and a folder for what learns them"
        fix = "data=digits, or data=path data.image_field=FIELD data.image_tokenizer=FOLDER"
        raise ConfigError("data.image_tokenizer", "(empty)", rule, fix)
    if trainer.batch % ranks:
        rule = f"each of {ranks} ranks takes an equal share"
        raise ConfigError("trainer.batch", trainer.batch, rule, f"trainer.batch={-(-trainer.batch // ranks) * ranks}")
