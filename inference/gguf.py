"""A GGUF file as a model folder that the engine reads: weights made fp32 again, tokenizer and chat template beside."""

import shutil
from pathlib import Path
from typing import Any

from conf.errors import DataError
from data.files import exclusive, file_digest, fsync_folder


def as_folder(file: Path, cache: Path) -> Path:
    """Writes ``file`` as a folder below ``cache``, named by its digest, unless it is there; returns the folder.

    Raises DataError where transformers or gguf are not installed, or the file is not a model that they read.
    """
    folder = cache / f"{file.stem}-{file_digest(file)[:12]}"
    with exclusive(cache, "one process at a time converts a model", "wait for the other run"):
        if not folder.exists():
            _write(file, folder)
    return folder


def _write(file: Path, folder: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging
    except ImportError as error:
        raise DataError(str(file), "", "GGUF files are read by transformers", "pip install 'sundog[gguf]'") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=plain, **options
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(temporary)
    except Exception as error:  # transformers raises many kinds for a file that it cannot read
        shutil.rmtree(temporary, ignore_errors=True)
        rule = "a GGUF file of a causal language model that the installed transformers reads"
        raise DataError(str(file), f"{type(error).__name__}: {error}"[:300], rule, "choose another model") from error
    temporary.rename(folder)
    fsync_folder(folder.parent)
