"""Document vectors by a transformer: batches of about equal length, last states pooled over the tokens of a document.

A worker process keeps its model from one unit to the next. fp32, one thread; no padding token counts.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from conf.errors import DataError
from data.documents import read_texts
from data.embedders.centre import raw_name
from data.shards import write_array
from data.stages import Unit, record_files, unit

BATCH_TOKENS = 4096  # padding included
TOKEN_CHARS = 16  # of a text, for each token that is looked at: no language writes longer ones on average


@functools.lru_cache(maxsize=2)
def load_encoder(folder: str, digest: str) -> tuple[Any, Any]:
    """Model and tokenizer of a local folder; ``digest`` tells other weights at the same path apart."""
    del digest
    try:
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        rule = "transformers can load the model and its tokenizer"
        raise DataError(folder, str(error)[:300], rule, "check order.model") from error


def encode(
    model: Any, tokenizer: Any, texts: list[str], most_tokens: int, pooling: str = "mean"
) -> npt.NDArray[np.float32]:
    """Vectors ``[texts, dims]``: the mean of the last states of a text's tokens, or the ``first`` token's."""
    ids = [
        tokenizer(text[: most_tokens * TOKEN_CHARS], truncation=True, max_length=most_tokens)["input_ids"]
        for text in texts
    ]
    rows = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    waiting = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: (-len(ids[i]), i))
    while waiting:
        width = len(ids[waiting[0]])
        group, waiting = waiting[: max(1, BATCH_TOKENS // width)], waiting[max(1, BATCH_TOKENS // width) :]
        tokens = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros(len(group), width, dtype=torch.long)
        for row, index in enumerate(group):
            tokens[row, : len(ids[index])] = torch.tensor(ids[index])
            mask[row, : len(ids[index])] = 1
        with torch.inference_mode():
            states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        if pooling == "mean":
            found = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            found = states[:, 0]
        rows[group] = found.numpy()
    return rows


@unit
def raw_unit(work: Unit) -> Unit:
    """Raw vectors of one curated part."""
    torch.set_num_threads(1)  # a worker is one of several on the machine
    model, tokenizer = load_encoder(work["model_folder"], work["model"])
    texts = list(read_texts(Path(work["curated"]) / work["file"]))
    rows = encode(model, tokenizer, texts, work["tokens"], work["pooling"])
    write_array(Path(work["folder"]) / raw_name(work["index"]), rows)
    return {"dimensions": rows.shape[1], "files": record_files(work["folder"], [raw_name(work["index"])])}
