import pytest
import torch
from torch import Tensor

from models import attention
from models.attention import cached_attention, first_of_document, local_attention
from tests.unit.models.builders import random_batch, small_model


def oracle(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
    """Softmax attention written out in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    length = q.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if ids is not None:
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def heads(batch: int, length: int, n: int, kv: int, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, length, h, dim, generator=generator, requires_grad=True) for h in (n, kv, kv))
    return q, k, v


DOCUMENTS = {
    "none": None,
    "one": [[0] * 23] * 2,
    "several": [[3] * 5 + [1] * 9 + [8] * 9, [0] * 1 + [1] * 22],
    "padding": [[0] * 23, [0] * 3 + [-1] * 20],
    "all padding": [[-1] * 23, [7] * 23],
    "interleaved": [[0, 1] * 11 + [0], [5, 5, 2] * 7 + [2, 5]],
}


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_local_attention_against_the_oracle(documents: str, kv: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    rows = DOCUMENTS[documents]
    ids = None if rows is None else torch.tensor(rows)
    inputs = heads(2, 23, 4, kv)
    out = local_attention(*inputs, ids)
    expected = oracle(*inputs, ids)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad(out, inputs, direction)
    exact = torch.autograd.grad(expected, inputs, direction.double())
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_keys_before_the_oldest_document_of_a_block_are_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    shapes = []
    inner = attention._sdpa

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        shapes.append((q.shape[1], k.shape[1]))
        return inner(q, k, v, mask, causal)

    monkeypatch.setattr(attention, "_sdpa", spy)
    ids = torch.arange(32)[None] // 4
    local_attention(*heads(1, 32, 2, 1), ids)
    assert shapes == [(8, 8)] * 4


def test_first_of_document():
    ids = torch.tensor([[9, 9, 4, 9, -1], [-1, -1, 10**12, 0, 0]])
    assert first_of_document(ids).tolist() == [[0, 0, 2, 0, 4], [0, 0, 2, 3, 3]]


@pytest.mark.parametrize("queries", [1, 5, 23])
def test_cached_attention_is_the_tail_of_the_whole(queries: int):
    q, k, v = heads(2, 23, 4, 2)
    tail = cached_attention(q[:, -queries:], k, v)
    torch.testing.assert_close(tail.double(), oracle(q, k, v, None)[:, -queries:], rtol=1e-5, atol=1e-6)


def test_packed_documents_equal_separate_runs():
    model = small_model()
    lengths = [7, 1, 12]
    tokens, _ = random_batch(1, sum(lengths) + 3)
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((3,), -1)])[None]
    positions = torch.cat([torch.arange(n) for n in [*lengths, 3]])[None]
    with torch.no_grad():
        packed = model(tokens, positions, ids)
        start = 0
        for n in lengths:
            alone = model(tokens[:, start : start + n], torch.arange(n)[None])
            torch.testing.assert_close(packed[:, start : start + n], alone, rtol=1e-4, atol=1e-5)
            start += n
    assert bool(packed.isfinite().all())
