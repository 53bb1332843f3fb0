"""Images in documents: marks in the text, files beside it, and the token ids that both become.

A document's text holds a mark where an image stands; the mark names the image by its content. So texts that differ in
their images differ, whatever removes a line removes its images with it, and rules that edit texts need no knowledge of
images. In the vocabulary come first the text's ids, then begin and end of an image, then the codes of the image
tokenizer: the modality ``image`` of ``model.modality_tokens`` is exactly these codes.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from conf.errors import DataError
from data.documents import Document
from data.files import file_digest, read_json
from data.tokenize import Tokenizer

PLACE = "<|image|>"  # in the user's text: here stands the next of the record's images
MARK = re.compile(r"<\|image:([0-9a-f]{16})\|>")
MODALITY = "text+image"
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of an image tokenizer's folder
MAX_PIXELS = 100_000_000  # of an image that is opened; more is taken for a decompression bomb
Pixels = npt.NDArray[np.uint8]  # [height, width, channels]
Codes = npt.NDArray[np.int64]


class BadImage(ValueError):
    """An image, or a record's list of them, that cannot be used; ``reason`` is what is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def name_of(image: bytes) -> str:
    """The name that a mark calls an image by: the beginning of its SHA-256."""
    return hashlib.sha256(image).hexdigest()[:16]


def mark_of(image: bytes) -> str:
    """The mark that stands for an image in a text."""
    return f"<|image:{name_of(image)}|>"


def attach(document: Document, images: Sequence[bytes]) -> Document:
    """The document with its images in place of ``PLACE`` in its text, in order; before the text where it has none.

    Raises BadImage for an image that cannot be decoded, and for another number of places than of images.
    """
    if not images:
        return document
    for image in images:
        open_image(image)
    pieces = document.text.split(PLACE)
    marks = [mark_of(image) for image in images]
    if len(pieces) == 1:
        text = "".join(marks) + document.text
    elif len(pieces) - 1 == len(marks):
        text = pieces[0] + "".join(mark + piece for mark, piece in zip(marks, pieces[1:], strict=True))
    else:
        raise BadImage("image_count", f"{len(pieces) - 1} places for {len(marks)} images")
    return replace(document, text=text, modality=MODALITY, images=tuple(images))


def open_image(content: bytes) -> Image.Image:
    """The decoded image. Raises BadImage for a file that is broken, of an unknown format or absurdly large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes that the next line judges
            image = Image.open(io.BytesIO(content))
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise BadImage("broken_image", f"{image.width} x {image.height} pixels")
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage("broken_image", str(error)) from error


def pixels_of(content: bytes, size: int, channels: int) -> Pixels:
    """An image as ``[size, size, channels]``: the shorter side scaled to ``size``, the middle of the longer one kept.

    Transparency is laid over black; one channel is luminance, three are RGB.
    """
    image = open_image(content)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert("L" if channels == 1 else "RGB")
    scale = size / min(image.size)
    if image.size != (size, size):
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8).reshape(size, size, channels)


def png(pixels: Pixels) -> bytes:
    """Pixels ``[height, width, 1 or 3]`` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(images: Sequence[Pixels], columns: int, gap: int = 2) -> Pixels:
    """Images of one size in rows of ``columns``, on white."""
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


@dataclass(frozen=True)
class ImageSpec:
    """Sizes of an image tokenizer: an image of ``size x size`` pixels becomes ``(size / patch)^2`` of ``codes``."""

    kind: str
    size: int
    channels: int
    patch: int  # pixels along each side of the square that a token stands for
    codes: int
    width: int  # of the networks
    code_dim: int

    @property
    def tokens(self) -> int:
        """Codes of one image."""
        return (self.size // self.patch) ** 2


def read_image_spec(folder: str | Path) -> ImageSpec:
    """Sizes of the image tokenizer in a folder. Raises DataError where there is none or it is damaged."""
    folder = Path(folder).expanduser()
    if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
        rule = "a folder with the image tokenizer that turns this corpus' images into tokens"
        raise DataError("data.image_tokenizer", folder, rule, "train one: sundog train trainer=image_tokenizer")
    stored = read_json(folder / CONFIG)
    try:
        return ImageSpec(**{name: stored[name] for name in ImageSpec.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        rule = "the config of an image tokenizer"
        raise DataError(str(folder / CONFIG), f"no {error}", rule, "sundog train trainer=image_tokenizer") from error


def image_tokenizer_digest(folder: str | Path) -> dict[str, str]:
    """SHA-256 of the files of an image tokenizer: what decides the codes of an image."""
    return {name: file_digest(Path(folder).expanduser() / name) for name in (CONFIG, WEIGHTS)}


def marked_images(texts: Sequence[str], images: Sequence[Sequence[bytes]]) -> dict[str, bytes]:
    """The images that the texts' marks name, by name."""
    found: dict[str, bytes] = {}
    for text, own in zip(texts, images, strict=True):
        if own:
            named = {name_of(image): image for image in own}
            found |= {name: named[name] for name in MARK.findall(text) if name in named}
    return found


def without_marks(text: str) -> str:
    """The text alone."""
    return MARK.sub("", text)


def interleave(tokenizer: Tokenizer, texts: Sequence[str], codes: Mapping[str, Codes]) -> Iterator[list[int]]:
    """Token ids of texts with marks: each mark of an image in ``codes`` becomes begin, its codes, end."""
    ids = tokenizer.images
    pieces = [_pieces(text, codes) if codes else [text] for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for own in pieces for piece in own[::2]]))
    for own in pieces:
        tokens: list[int] = []
        for place, piece in enumerate(own):
            if place % 2 == 0:
                tokens += next(encoded)
            else:
                assert ids is not None, "codes of images need their ids in the vocabulary"
                tokens += [ids.begin, *(codes[piece] + ids.first).tolist(), ids.end]
        yield tokens


def _pieces(text: str, codes: Mapping[str, Codes]) -> list[str]:
    """Text, name of an image, text, and so on; a mark that names no image is text."""
    pieces = [""]
    for place, piece in enumerate(MARK.split(text)):
        if place % 2 and piece in codes:
            pieces += [piece, ""]
        else:
            pieces[-1] += f"<|image:{piece}|>" if place % 2 else piece
    return pieces


def image_spans(tokens: npt.NDArray[np.integer], begin: int, end: int) -> tuple[Codes, Codes]:
    """Where images start and where they are over, in a stream of whole documents' tokens; both int64 ``[images]``."""
    starts, ends = np.flatnonzero(tokens == begin), np.flatnonzero(tokens == end) + 1
    assert len(starts) == len(ends), "begin and end of an image come in pairs"
    return starts, ends


def code_names(index: int) -> tuple[str, str]:
    """Files of one part's images: their names, ``[images]`` strings, and their codes, uint32 ``[images, tokens]``."""
    return f"names-{index:05d}.npy", f"codes-{index:05d}.npy"


def read_codes(folder: str | Path, index: int) -> dict[str, Codes]:
    """The codes of one part's images by name."""
    names, codes = (np.load(Path(folder) / name) for name in code_names(index))
    return {name.decode(): row.astype(np.int64) for name, row in zip(names.tolist(), codes, strict=True)}
