"""A checkpoint as a Hugging Face folder that says where it comes from. One process, no process group."""

import json
from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.schema import RunConfig
from data.stages import stage_folders
from data.tokenize import load_tokenizer
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf
from trainers.checkpoint import load_weights
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints, read_state, step_folder, step_of
from trainers.wandb_run import record_export

LINEAGE_FILE = "sundog.json"


def choose_checkpoint(config: RunConfig) -> Path:
    """Return the checkpoint of ``export.step``, or the newest complete one where that is 0.

    Raises:
        DataError: there is none.
    """
    folder = checkpoints_folder(config.run_dir)
    found = complete_checkpoints(folder)
    if not found:
        raise DataError("run_dir", config.run_dir, "it must hold a complete checkpoint", "run `sundog train` first")
    wanted = step_folder(folder, config.export.step) if config.export.step else found[0]
    if wanted not in found:
        steps = ", ".join(str(step_of(path)) for path in reversed(found))
        raise DataError("export.step", config.export.step, f"complete checkpoints: {steps}", "export.step=0 (newest)")
    return wanted


def lineage(checkpoint: Path, state: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return what an exported model says about its origin."""
    kept = ("step", "tokens", "loss", "eval_loss", "stages", "config_digest", "git_revision", "seed")
    facts = {name: state[name] for name in kept}
    return {"run": state["config"]["name"], "checkpoint": str(checkpoint), "dtype": dtype, **facts} | {
        "tokenizer": state["identity"]["tokenizer"],
        "shards": state["identity"]["shards"],
        "config": state["config"],
    }


def export(config: RunConfig) -> Path:
    """Write ``export.dir``: weights, config, tokenizer and ``sundog.json``; returns the folder.

    The folder appears whole, and replaces an earlier export.

    Raises:
        DataError: no usable checkpoint, a tokenizer that is not the one of the training, or a folder that cannot be
            written.
        ResourceError: the disk is full.
    """
    checkpoint = choose_checkpoint(config)
    weights = load_weights(checkpoint)
    state = read_state(checkpoint)
    sizes: dict[str, Any] = state["identity"]["model"]
    spec = ModelSpec.from_dict(sizes)
    folder = stage_folders(config).tokenizer
    digest = load_tokenizer(folder).digest
    if digest != state["identity"]["tokenizer"]:
        raise DataError(
            str(folder),
            digest,
            f"the model was trained with tokenizer {state['identity']['tokenizer']}",
            "point data.dir at the data of the run",
        )
    model = Decoder(spec)
    model.load_state_dict(weights)
    origin = json.dumps(lineage(checkpoint, state, config.export.dtype), indent=1, sort_keys=True) + "\n"
    exported = save_hf(model, config.export.dir, folder, config.export.dtype, notes={LINEAGE_FILE: origin})
    record_export(config, checkpoint, exported)
    return exported
