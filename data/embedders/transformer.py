"""Sentence-transformer and Contriever folders: a transformer's last states, pooled as the folder says, else by mean.

The model itself runs in ``inference/embeddings.py``, named here only: nothing below ``data`` imports torch.
"""

from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.schema import OrderConfig
from data.annotators import path_digest
from data.embedders.centre import centre
from data.files import read_json
from data.stages import RunUnits, Stage, Unit

MAX_TOKENS = 256  # of a document where the folder does not say
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def settings(order: OrderConfig) -> dict[str, Any]:
    """What decides the vectors besides the documents."""
    folder = Path(order.model).expanduser()
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        rule = f"config.json and one of {', '.join(WEIGHTS)}"
        raise DataError(str(folder), "not a model's folder", rule, "order.model=FOLDER of a transformers model")
    said = folder / "sentence_bert_config.json"
    tokens = int(read_json(said).get("max_seq_length") or MAX_TOKENS) if said.is_file() else MAX_TOKENS
    pooling = folder / "1_Pooling" / "config.json"
    first = pooling.is_file() and bool(read_json(pooling).get("pooling_mode_cls_token"))
    return {
        "embedder": "transformer",
        "model": path_digest(folder),
        "tokens": tokens,
        "pooling": "first" if first else "mean",
    }


def embed(stage: Stage, shared: Unit, parts: list[Unit], run_units: RunUnits) -> tuple[int, list[Unit]]:
    """Writes the vectors of all parts; returns their dimensions and the units' results."""
    raws = stage.units("raw", [{**shared, **part} for part in parts])
    embedded = run_units("order: embed", "inference.embeddings:raw_unit", raws)
    return embedded[0]["dimensions"], [*embedded, *centre(stage, shared, parts, run_units)]
