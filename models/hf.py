"""Hugging Face model folders: safetensors weights, config.json and the tokenizer's files.

``transformers.AutoModelForCausalLM.from_pretrained`` and servers that read such folders load what is written here;
what is read here gives the same logits as there.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.errors import ConfigError, DataError, SundogError
from data.files import fsync_folder, make_folder, read_json, write_atomic, write_error, writing
from data.tokenize import Tokenizer, copy_tokenizer, load_tokenizer
from models.decoder import Decoder
from models.hf_config import CONFIG, config_of, read_spec
from models.hf_names import EXACT, HEAD, HF_HEAD, OBSOLETE_SUFFIX, hf_names
from models.spec import ModelSpec

__all__ = ["load_hf", "read_spec", "save_hf"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READABLE = ("F64", "F32", "F16", "BF16")
SHARD_BYTES = 4 * 2**30
REMAKE = "export or download the model again"


def save_hf(
    model: Decoder,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder; it appears complete or not at all, and replaces an earlier model folder.

    Args:
        model: with whole (not sharded) parameters.
        folder: where to; created with its parents.
        tokenizer_folder: its tokenizer files are copied.
        dtype: ``fp32`` or ``bf16``, of the stored weights.
        shard_bytes: weights beyond it are spread over several files.
        notes: further text files by name, such as where the model comes from.

    Raises:
        DataError: the folder holds something else, cannot be written, or the tokenizer has more ids than the model.
        ResourceError: the disk is full.
        ConfigError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError("export.dtype", dtype, f"must be one of {', '.join(DTYPES)}", "choose one of them")
    target = Path(folder)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / CONFIG).is_file())):
        raise DataError(str(target), "", "must be new, empty or a model folder", "choose another folder")
    tokenizer = None if tokenizer_folder is None else load_tokenizer(tokenizer_folder)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, model.spec, str(tokenizer_folder))
    parent = make_folder(target.absolute().parent)
    for left_over in parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    staging = parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
    make_folder(staging)
    try:
        _write_weights(model, staging, dtype, shard_bytes, target)
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, staging)
            if (template := Path(tokenizer_folder) / TEMPLATE).is_file():
                write_atomic(staging / TEMPLATE, template.read_bytes())
        _write_settings(model.spec, staging, tokenizer, dtype)
        for name, text in (notes or {}).items():
            write_atomic(staging / name, text)
        with writing(target):
            _replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a folder, on the CPU.

    Raises:
        DataError: as ``read_spec``; missing, unknown or misshapen tensors, unreadable files, weights of a type that
            is not a float of 16 to 64 bits, or a tokenizer in the folder with more ids than the embedding.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer(load_tokenizer(folder), spec, str(folder))
    found = _read_weights(folder, dtype, _expected_shapes(spec))
    state = {ours: found[theirs] for ours, theirs in hf_names(spec).items()}
    if spec.tie_embeddings:
        state[HEAD] = state["embed.weight"]
        if HF_HEAD in found and not torch.equal(found[HF_HEAD], state[HEAD]):
            rule = "must equal the embedding when tie_word_embeddings is true"
            raise DataError(f"{folder}: {HF_HEAD}", "", rule, f"set tie_word_embeddings to false in {CONFIG}")
    with torch.device("meta"):
        model = Decoder(spec)
    model.load_state_dict(state, assign=True)
    if spec.tie_embeddings:
        model.head.weight = model.embed.weight
    return model


def _expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        own = Decoder(spec).state_dict()
    return {theirs: tuple(own[ours].shape) for ours, theirs in hf_names(spec).items()}


def _check_tokenizer(tokenizer: Tokenizer, spec: ModelSpec, where: str) -> None:
    if tokenizer.vocab_size > spec.vocab_size:
        rule = f"must not have more ids than the model's embedding has rows ({spec.vocab_size})"
        raise DataError(f"{where}: tokenizer", f"{tokenizer.vocab_size} ids", rule, "use the model's own tokenizer")


def _write_weights(model: Decoder, staging: Path, dtype: str, shard_bytes: int, target: Path) -> None:
    own = model.state_dict()
    item = DTYPES[dtype].itemsize
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in hf_names(model.spec):
        weight = own[name].numel() * item
        if shards[-1] and size + weight > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + weight, total + weight
    placed: dict[str, str] = {}
    theirs = hf_names(model.spec)
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        types = {n: torch.float32 if n.endswith(EXACT) else DTYPES[dtype] for n in names}
        tensors = {theirs[n]: own[n].detach().to("cpu", types[n]).contiguous() for n in names}
        placed |= dict.fromkeys(tensors, file)
        try:
            save_file(tensors, staging / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _save_error(target, error) from error
        with writing(target), open(staging / file, "rb+") as written:
            os.fsync(written.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        write_atomic(staging / INDEX, json.dumps(index, indent=2) + "\n")


def _save_error(target: Path, error: SafetensorError) -> SundogError:
    """The library wraps the operating system's error number in its text."""
    code = re.search(r"code: (\d+)", str(error))
    number = int(code.group(1)) if code else 0
    return write_error(target, OSError(number, os.strerror(number) if number else str(error)))


def _write_settings(spec: ModelSpec, staging: Path, tokenizer: Tokenizer | None, dtype: str) -> None:
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        bos = read_json(staging / "tokenizer_config.json").get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        ids["bos_token_id"] = tokenizer.fast.token_to_id(bos) if bos else None
        ids["eos_token_id"], ids["pad_token_id"] = tokenizer.eos_id, tokenizer.pad_id
    config = config_of(spec, str(DTYPES[dtype]).removeprefix("torch."), ids)
    generation = {name: value for name, value in ids.items() if value is not None}
    write_atomic(staging / CONFIG, json.dumps(config, indent=2) + "\n")
    write_atomic(staging / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def _replace_folder(staging: Path, target: Path) -> None:
    fsync_folder(staging)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    fsync_folder(target.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        fix = "save it with safe_serialization" if any(folder.glob("*.bin")) else REMAKE
        raise DataError(str(folder), "", f"a model folder holds {WEIGHTS} or {INDEX}", fix)
    index = read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise DataError(str(folder / INDEX), "", "must hold a weight_map", REMAKE)
    files = []
    for name in sorted({str(value) for value in placed.values()}):
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(str(folder / INDEX), name, "must name files of its own folder that exist", REMAKE)
        files.append(folder / name)
    return files


def _read_weights(folder: Path, dtype: torch.dtype, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The expected tensors (and the head, if stored) from all files, every one checked before it is read."""
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    if name.endswith(OBSOLETE_SUFFIX):
                        continue
                    _check_tensor(file.get_slice(name), name, path, expected)
                    found[name] = file.get_tensor(name).to(torch.float32 if name.endswith(EXACT) else dtype)
        except (SafetensorError, OSError) as error:
            raise DataError(str(path), str(error)[:200], "must be a complete safetensors file", REMAKE) from error
    missing = [name for name in expected if name not in found]
    if missing:
        raise DataError(f"{folder}: {missing[0]}", f"missing ({len(missing)} tensors)", f"{CONFIG} asks for it", REMAKE)
    return found


def _check_tensor(tensor: Any, name: str, path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    shape = expected.get(name)
    if shape is None and name == HF_HEAD:
        shape = expected["model.embed_tokens.weight"]  # a tied model may store its head too
    if shape is None:
        rule = "the weights are those of the model that config.json describes, and no others"
        raise DataError(f"{path}: {name}", "unknown tensor", rule, "use the config.json that belongs to the weights")
    if tuple(tensor.get_shape()) != shape:
        rule = f"must have the shape {list(shape)} that follows from {CONFIG}"
        raise DataError(f"{path}: {name}", list(tensor.get_shape()), rule, "use the config.json of these weights")
    if tensor.get_dtype() not in READABLE:
        rule = f"weights are stored as {', '.join(READABLE)}"
        raise DataError(f"{path}: {name}", tensor.get_dtype(), rule, "store the model without quantisation")
