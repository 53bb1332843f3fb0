"""The tokenizer: a byte-level BPE trained on the corpus or loaded from a folder, and its wrapper.

Source of the method: Sennrich et al. 2016 (BPE), Radford et al. 2019 (bytes as the base alphabet). The work is done by
Hugging Face tokenizers; ``transformers.AutoTokenizer`` reads the folders that are written here.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from conf.errors import DataError
from data.files import digest_json, file_digest, read_json, write_atomic

END = "<|endoftext|>"  # ends a document; begins a prompt
PAD = "<|pad|>"
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>")  # where tokenizer_config.json names none
KNOWN_PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
BEGIN_IMAGE, END_IMAGE, IMAGE_CODE = "<|image_begin|>", "<|image_end|>", "<|image_code_{}|>"
IMAGE_TOKENIZER = "image_tokenizer"  # folder beside tokenizer.json, where images are part of the vocabulary


@dataclass(frozen=True)
class ImageIds:
    """Where images lie in a vocabulary: their begin and end, and ``codes`` ids from ``first`` on."""

    begin: int
    end: int
    first: int
    codes: int


class Tokenizer:
    """Text to token ids and back.

    ``digest`` is the SHA-256 of tokenizer.json, or of it and the image tokenizer beside it: what decides what ids mean.
    ``images`` says where images lie in the vocabulary; None: it has none.
    """

    def __init__(self, fast: FastTokenizer, eos_id: int, pad_id: int, digest: str) -> None:
        self.fast, self.eos_id, self.pad_id, self.digest = fast, eos_id, pad_id, digest
        self.vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        self.images = _image_ids(fast, self.vocab_size)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text, without any added at its ends.

        Names of special tokens inside the text are plain text unless ``allow_special``: a document cannot end itself.
        """
        self.fast.encode_special_tokens = not allow_special
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, as ``encode`` gives them."""
        self.fast.encode_special_tokens = True
        return [encoding.ids for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that form no character become U+FFFD."""
        return self.fast.decode(list(tokens), skip_special_tokens=skip_special)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Trains a byte-level BPE and writes tokenizer.json and tokenizer_config.json. The same texts give the same bytes.

    ``vocab_size`` counts the special tokens and the 256 bytes; a small corpus may give fewer.
    """
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    write_tokenizer(folder, fast.to_str(pretty=True), settings)


def write_tokenizer(folder: str | Path, tokenizer_json: bytes | str, settings: dict[str, Any]) -> None:
    """Writes the two files of a tokenizer folder."""
    write_atomic(Path(folder) / TOKENIZER, tokenizer_json)
    write_atomic(Path(folder) / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a user names by its folder or directly. Raises DataError when there is none."""
    path = Path(path).expanduser()
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise DataError("data.tokenizer", path, "a tokenizer.json or a folder that holds one", "check the path")
    return file


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads tokenizer.json, with the special tokens that tokenizer_config.json beside it names.

    Raises DataError when the file is missing or broken, or has no token that ends a document.
    """
    file = tokenizer_file(path)
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any unreadable file
        rule = "the file is a tokenizer of the Hugging Face tokenizers library"
        raise DataError(str(file), str(error)[:200], rule, "save it with tokenizer.save() or choose another") from error
    settings_file = file.with_name(SETTINGS)
    settings = read_json(settings_file) if settings_file.is_file() else {}
    eos = _special(fast, settings.get("eos_token"), KNOWN_ENDS)
    if eos is None:
        rule = "a tokenizer has a token that ends a document"
        raise DataError(str(file), f"no eos_token, none of {', '.join(KNOWN_ENDS)}", rule, f"name it in {SETTINGS}")
    pad = _special(fast, settings.get("pad_token"), KNOWN_PADS)
    digest = file_digest(file)
    if (images := file.parent / IMAGE_TOKENIZER).is_dir():
        digest = digest_json([digest, {image_file.name: file_digest(image_file) for image_file in _files(images)}])
    return Tokenizer(fast, eos, eos if pad is None else pad, digest)


@functools.lru_cache(maxsize=1)
def resident_tokenizer(path: str, digest: str) -> Tokenizer:
    """The tokenizer of this process: the library keeps what each one it has loaded remembers of words, for good."""
    del digest  # a changed file at the same path is another tokenizer
    return load_tokenizer(path)


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copies a loaded tokenizer's files as they are, with its special tokens spelled out in tokenizer_config.json."""
    file = tokenizer_file(source)
    tokenizer = load_tokenizer(file)
    settings_file = file.with_name(SETTINGS)
    settings = read_json(settings_file) if settings_file.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    eos, pad = (tokenizer.fast.id_to_token(i) for i in (tokenizer.eos_id, tokenizer.pad_id))
    settings = {"bos_token": eos, **settings, "eos_token": eos, "pad_token": pad}
    write_tokenizer(folder, file.read_bytes(), settings)
    if (images := file.parent / IMAGE_TOKENIZER).is_dir():
        copy_files(images, Path(folder) / IMAGE_TOKENIZER)


def add_images(folder: str | Path, image_tokenizer: str | Path, codes: int) -> None:
    """Gives the tokenizer in a folder ids for images, last in its vocabulary, and a copy of their tokenizer.

    A tokenizer that came with that very image tokenizer stays as it is. Raises DataError for a vocabulary that has
    other images.
    """
    folder, source = Path(folder), Path(image_tokenizer).expanduser()
    tokenizer = load_tokenizer(folder)
    if tokenizer.images is not None:
        own = folder / IMAGE_TOKENIZER
        if own.is_dir() and all(file.read_bytes() == (own / file.name).read_bytes() for file in _files(source)):
            return
        rule = "images are added to the vocabulary of text"
        fix = f"data.image_tokenizer={own} if it came with this tokenizer, or a tokenizer of text"
        raise DataError("data.tokenizer", f"{tokenizer.images.codes} codes of other images", rule, fix)
    names = [BEGIN_IMAGE, END_IMAGE, *map(IMAGE_CODE.format, range(codes))]
    tokenizer.fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    write_tokenizer(folder, tokenizer.fast.to_str(pretty=True), read_json(folder / SETTINGS))
    copy_files(source, folder / IMAGE_TOKENIZER)


def copy_files(source: Path, folder: Path) -> None:
    """Copies the files of a folder, each whole or not at all."""
    for file in _files(source):
        write_atomic(folder / file.name, file.read_bytes())


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _image_ids(fast: FastTokenizer, vocab_size: int) -> ImageIds | None:
    begin, end, first = (fast.token_to_id(name) for name in (BEGIN_IMAGE, END_IMAGE, IMAGE_CODE.format(0)))
    return None if begin is None or end is None or first is None else ImageIds(begin, end, first, vocab_size - first)


def _special(fast: FastTokenizer, named: Any, known: Sequence[str]) -> int | None:
    """Id of the named special token (a string, or an object with ``content``), else of the first known one."""
    name = named.get("content") if isinstance(named, dict) else named
    for candidate in (name,) if name else known:
        found = fast.token_to_id(candidate)
        if found is not None:
            return found
    return None
