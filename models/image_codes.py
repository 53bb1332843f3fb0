"""Units of work that encode the images of documents; ``data.pack`` names them to its executor."""

from pathlib import Path

import numpy as np
import torch

from data.documents import read_batches
from data.images import code_names, marked_images, pixels_of
from data.shards import write_array
from data.stages import Unit, record_files, unit
from models.image_tokenizer import load_image_tokenizer


@unit
def encode_unit(work: Unit) -> Unit:
    """The codes of one curated part's images. Memory: the codes, and the images of one batch of documents."""
    folder, files = Path(work["folder"]), code_names(work["index"])
    torch.set_num_threads(1)  # a worker is one of several on the machine
    tokenizer = load_image_tokenizer(work["image_tokenizer"])
    spec = tokenizer.spec
    names: list[str] = []
    codes = [np.zeros((0, spec.tokens), dtype=np.int64)]
    for batch in read_batches(Path(work["curated"]) / work["file"], ["text", "images"]):
        found = marked_images(batch.column(0).to_pylist(), batch.column(1).to_pylist())
        if found:
            pixels = np.stack([pixels_of(image, spec.size, spec.channels) for image in found.values()])
            codes.append(tokenizer.encode(pixels))
            names += found
    write_array(folder / files[0], np.array(names, dtype="S16"))
    write_array(folder / files[1], np.concatenate(codes).astype(np.uint32))
    return {"images": len(names), "files": record_files(folder, files)}
