"""GGUF files as model folders: ``transformers`` reads weights (restored to fp32), tokenizer and template, once."""

import io
import os
import shutil
import uuid
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from conf.errors import DataError
from data.files import digest_json, fsync_folder, make_folder, writing
from models.hf_config import CONFIG

CACHE_VARIABLE = "XDG_CACHE_HOME"


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that a user names by itself or by a folder without config.json; None: there is none."""
    path = Path(path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    return None if (path / CONFIG).is_file() else next(iter(sorted(path.glob("*.gguf"))), None)


def model_folder(path: str | Path) -> Path:
    """``path`` itself, or for a GGUF file the folder in the user's cache into which it has been read.

    The folder belongs to that path, size and time of change; it takes four bytes a weight.

    Raises:
        DataError: the file cannot be read, or the cache cannot be written.
        ResourceError: the disk is full.
    """
    file = find_gguf(path)
    if file is None:
        return Path(path)
    file, state = file.absolute(), file.stat()
    digest = digest_json([str(file), state.st_size, state.st_mtime_ns])[:16]
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "sundog" / "gguf"
    target = cache / f"{file.stem}-{digest}"
    if (target / CONFIG).is_file():
        return target
    tokenizer, model = read_with_transformers(file.parent, file.name)
    model.hf_quantizer = None  # the weights have been restored: they are saved as any model's
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    staging = make_folder(cache) / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with writing(staging):
            tokenizer.save_pretrained(staging)
            model.save_pretrained(staging)
            fsync_folder(staging)
            if not target.exists():  # another process may have been faster
                os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def read_with_transformers(folder: Path, gguf: str = "") -> tuple[Any, Any]:
    """(tokenizer, causal language model in fp32) of a folder, or of a GGUF file in it. Raises DataError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as error:
        rule = "another architecture than Llama, and GGUF, are read by transformers"
        raise DataError(str(folder / gguf), "", rule, "pip install 'sundog[gguf]'") from error
    import torch

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True} | ({"gguf_file": gguf} if gguf else {})
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its bar for GGUF has no switch
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    except Exception as error:  # transformers raises many kinds for a folder that it cannot read
        rule = "a causal language model that the installed transformers can read"
        value = f"{type(error).__name__}: {error}"[:300]
        raise DataError(str(folder / gguf), value, rule, "check the folder") from error
    return tokenizer, model
