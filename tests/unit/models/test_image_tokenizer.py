"""The image tokenizer against slow readable twins, its files, and what happens to broken ones."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conf.errors import DataError
from models.image_tokenizer import Codebook, VectorQuantised, load_image_tokenizer, save_image_tokenizer, to_tensor
from tests.unit.models.images import SPEC


def images(count: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SPEC.size, SPEC.size, channels), dtype=np.uint8)


def ready(seed: int = 0, channels: int = 1) -> VectorQuantised:
    """A model whose codebook holds vectors of its own encoder."""
    model = VectorQuantised(replace(SPEC, channels=channels)).initialise(seed)
    model(to_tensor(images(20, seed, channels)))
    model.codebook.move(0.9, 1.0, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_the_nearest_vectors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    book = Codebook(7, 3)
    book.vectors.normal_(generator=generator)
    z = torch.randn(50, 3, generator=generator)
    expected = [min(range(7), key=lambda k, v=v: float((v.double() - book.vectors[k].double()).norm())) for v in z]
    assert book.nearest(z).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_codebook_follows_the_means_of_what_chose_each_code(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    book = Codebook(6, 3).train()
    book.vectors.normal_(generator=generator)
    book.counts.fill_(5.0)
    book.sums.copy_(5 * book.vectors)
    z = torch.randn(40, 3, generator=generator)
    counts, sums = book.counts.double().clone(), book.sums.double().clone()
    chosen = book.nearest(z).tolist()
    for k in range(6):
        mine = [z[n].double() for n in range(40) if chosen[n] == k]
        counts[k] = 0.8 * counts[k] + 0.2 * len(mine)
        sums[k] = 0.8 * sums[k] + 0.2 * sum(mine, torch.zeros(3, dtype=torch.float64))
    book(z)
    assert book.move(0.8, 0.0, generator) == 1.0
    torch.testing.assert_close(book.vectors.double(), sums / counts[:, None], rtol=1e-5, atol=1e-6)


def test_codes_that_nothing_chooses_move_to_vectors_of_the_batch() -> None:
    book = Codebook(4, 2).train()
    book.vectors.copy_(torch.tensor([[0.0, 0], [9, 9], [8, 8], [7, 7]]))
    z = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    book(z)
    used = book.move(0.5, 0.1, torch.Generator().manual_seed(0))
    assert used == 0.25
    rows = {tuple(row) for row in z.tolist()}
    assert all(tuple(vector) in rows for vector in book.vectors[1:].tolist())


def test_gradients_pass_the_codes_unchanged() -> None:
    model = ready()
    batch = to_tensor(images(3, 5))
    exact = copy.deepcopy(model).double()
    (model(batch)[0] + 0.3 * model(batch)[1]).backward()
    # The twin: the decoder sees the code; its gradient with respect to the code is given to the encoder.
    z = exact._vectors(batch.double())
    q = exact.codebook.vectors[exact.codebook.nearest(z)].detach().requires_grad_()
    restored = exact._images(q, 3)
    error = F.mse_loss(restored, batch.double())
    error.backward()
    assert q.grad is not None
    (z * q.grad).sum().backward(retain_graph=True)
    (0.3 * (z - q.detach()).square().mean()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_encode_and_decode_agree_with_the_forward_pass(count: int, channels: int) -> None:
    model = ready(channels=channels).eval()
    pixels = images(count, 3, channels)
    codes = model.encode(pixels)
    assert codes.shape == (count, SPEC.tokens)
    restored = model.decode(codes)
    assert restored.shape == pixels.shape
    if count:
        q = model.codebook.vectors[torch.from_numpy(codes).flatten()]
        with torch.no_grad():
            expected = model._images(q, count).clamp(0, 1) * 255
        assert np.abs(restored - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.5001
        assert np.array_equal(model.encode(pixels[:1]), codes[:1]), "an image's codes do not depend on its batch"


def test_codes_that_the_codebook_lacks_are_an_error() -> None:
    with pytest.raises(DataError, match=r"from 0 to 11"):
        ready().decode(np.full((1, SPEC.tokens), 12))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = ready().eval()
    save_image_tokenizer(model, tmp_path / "t", {"note.json": "{}"})
    found = load_image_tokenizer(tmp_path / "t")
    pixels = images(9, 4)
    assert found.spec == SPEC
    assert np.array_equal(found.encode(pixels), model.encode(pixels))
    assert np.array_equal(found.decode(found.encode(pixels)), model.decode(model.encode(pixels)))
    save_image_tokenizer(ready(1), tmp_path / "t")
    assert not np.array_equal(load_image_tokenizer(tmp_path / "t").encode(pixels), model.encode(pixels))


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trainer=image_tokenizer"):
        load_image_tokenizer(tmp_path)
    folder = save_image_tokenizer(ready(), tmp_path / "t")
    config = json.loads((folder / "config.json").read_text())
    for change, match in (({"kind": "other"}, "one of vq"), ({"codes": 13}, "weights that config"), ({}, "no 'width'")):
        broken = config | change if change else {k: v for k, v in config.items() if k != "width"}
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=match):
            load_image_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_image_tokenizer(folder)
