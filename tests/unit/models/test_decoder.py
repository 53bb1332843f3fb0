import copy
import math

import pytest
import torch
import torch.nn.functional as F

from models.cache import KVCache
from models.decoder import Decoder
from models.loss import linear_cross_entropy
from tests.unit.models.builders import SMALL, random_batch, small_model


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    first = small_model(seed=5)
    before = torch.random.get_rng_state()
    second = Decoder(SMALL)
    torch.random.set_rng_state(before)
    second.initialise(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    name = "layers.0.attention.q.weight"
    assert not torch.equal(first.get_parameter(name), small_model(seed=6).get_parameter(name))


def test_initial_scales():
    model = small_model(dim=256, ffn_dim=512, init_std=0.02, tie_embeddings=False)
    residual = 0.02 / math.sqrt(2 * SMALL.layers)
    scales = {"mlp.gate": 0.02, "attention.k": 0.02, "mlp.down": residual, "attention.out": residual}
    for layer in range(SMALL.layers):
        for name, scale in scales.items():
            weight = model.get_parameter(f"layers.{layer}.{name}.weight")
            assert weight.std().item() == pytest.approx(scale, rel=0.03), name
        assert model.get_parameter(f"layers.{layer}.attention_norm.weight").eq(1).all()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_no_token_sees_a_later_one():
    model = small_model()
    tokens, positions = random_batch(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % SMALL.vocab_size
    with torch.no_grad():
        a, b = model(tokens, positions), model(changed, positions)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 5, 7], [19, 1]])
def test_the_cache_changes_nothing(chunks: list[int]):
    model = small_model()
    tokens, positions = random_batch(2, 20)
    cache = KVCache(model.spec, batch=2, block=8)
    parts, start = [], 0
    with torch.no_grad():
        whole = model(tokens, positions)
        for size in chunks:
            part = slice(start, start + size)
            parts.append(model(tokens[:, part], positions[:, part], cache=cache))
            start += size
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_truncated_cache_continues_from_there():
    model = small_model()
    tokens, positions = random_batch(1, 12)
    other, _ = random_batch(1, 12, seed=9)
    cache = KVCache(model.spec)
    with torch.no_grad():
        model(tokens[:, :8], positions[:, :8], cache=cache)
        model(other[:, 8:], positions[:, 8:], cache=cache)
        cache.truncate(8)
        again = model(tokens[:, 8:], positions[:, 8:], cache=cache)
        whole = model(tokens, positions)
    torch.testing.assert_close(again, whole[:, 8:], rtol=1e-4, atol=1e-5)


def test_cache_memory_follows_its_length():
    spec = SMALL
    cache = KVCache(spec, block=16)
    assert cache.nbytes == 0
    per_token = 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    for _ in range(100):
        part = torch.zeros(1, 1, spec.kv_heads, spec.head_dim)
        for layer in range(spec.layers):
            cache.append(layer, part, part)
        cache.advance(1)
        assert cache.nbytes <= per_token * (max(16, cache.length * 3 // 2) + 16)
    assert cache.nbytes >= per_token * 100


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_logits", [1, 97 * 7, 2**23])
def test_loss_equals_cross_entropy(tied: bool, chunk_logits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_cross_entropy, "__defaults__", (chunk_logits,))
    model = small_model(tie_embeddings=tied)
    tokens, positions = random_batch(2, 17)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 3:6] = -100
    reference = copy.deepcopy(model)
    logits = reference(tokens, positions)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    total, count = model.loss(tokens, labels, positions)
    assert int(count) == int((labels != -100).sum()) == 2 * 16 - 3
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    (total * 0.37).backward()
    (expected * 0.37).backward()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_without_labels_is_zero_and_has_zero_gradients():
    model = small_model()
    tokens, positions = random_batch(1, 5)
    total, count = model.loss(tokens, torch.full_like(tokens, -100), positions)
    total.backward()
    assert (total.item(), int(count)) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_gradients_agree_with_double_precision():
    model = small_model(init_std=0.1)
    exact = copy.deepcopy(model).double()
    tokens, positions = random_batch(2, 24)
    ids = torch.tensor([[0] * 10 + [1] * 14, [0] * 20 + [-1] * 4])
    labels = tokens.roll(-1, 1).masked_fill(ids < 0, -100)
    for one in (model, exact):
        total, count = one.loss(tokens, labels, positions, ids)
        (total / count).backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, (name, error)


def test_loss_gradient_of_the_head_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3, 5])
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 20)[0], (hidden, weight))


def test_bf16_autocast_stays_close_to_fp32():
    model = small_model(init_std=0.1)
    tokens, positions = random_batch(2, 16)
    plain, _ = model.loss(tokens, tokens, positions)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model.loss(tokens, tokens, positions)
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(plain.item(), rel=1e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_an_attention_core_set_from_outside_is_used_by_every_layer():
    model = small_model()
    seen = []

    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        seen.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), ids is None))
        return torch.zeros_like(q)

    tokens, positions = random_batch(1, 5)
    model.set_attention_core(core)
    model(tokens, positions)
    assert seen == [((1, 5, 4, 12), (1, 5, 2, 12), (1, 5, 2, 12), True)] * SMALL.layers
    assert "core" not in " ".join(model.state_dict())
