"""RMSNorm and rotation by blocks of rows against their plain twins: values and gradients, in every dtype."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused import rows
from fused.rows import plain_rms_norm, plain_rotate, rms_norm, rotate

SHAPES = [(1, 1, 8), (2, 7, 6), (3, 50, 16), (1, 5, 4, 8), (4, 64)]
ERROR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of a norm, relative


@pytest.fixture(autouse=True, params=[1, 24, 2**16])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row, of a few, of all."""
    monkeypatch.setattr(rows, "BLOCK", request.param)
    monkeypatch.setattr(rows, "SHARE", request.param)


def compare(mine: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Both on the same numbers, the twin in fp64."""
    given = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, expected = mine(*given), twin(*exact)
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = [out, *torch.autograd.grad(out, given, d_out)]
    wanted = [expected, *torch.autograd.grad(expected, exact, d_out.double())]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= ERROR[dtype] * other.norm()


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: plain_rms_norm(x, w, 1e-5), [x, weight], dtype)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("batch", [1, 3])
def test_rotation(batch: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 4, 6, generator=generator, dtype=torch.float64)
    angles = torch.rand(batch, 11, 1, 3, generator=generator) * 6.3
    cos, sin = angles.cos(), angles.sin()
    compare(lambda x: rotate(x, cos, sin), lambda x: plain_rotate(x, cos, sin), [x], dtype)


def test_gradients_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    angles = torch.rand(1, 5, 1, 1, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x.view(1, 5, 3, 2), angles.cos(), angles.sin()), (x,))


def test_strided_inputs_and_gradients():
    """Slices of wider tensors and transposed gradients, as attention hands them over."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 9, 12, generator=generator)
    weight = torch.ones(6)
    x = wide[..., 3:9].requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    d_out = torch.randn(9, 2, 6, generator=generator).transpose(0, 1)
    twin = wide[..., 3:9].detach().requires_grad_()
    expected = plain_rms_norm(twin, weight, 1e-5)
    torch.testing.assert_close(out, expected)
    got, want = torch.autograd.grad(out, x, d_out)[0], torch.autograd.grad(expected, twin, d_out)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("threads", "number"), [(1, 16), (2, 4), (8, 1)])
def test_more_threads_work_on_fewer_larger_blocks(threads: int, number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "BLOCK", 2**16)
    monkeypatch.setattr(rows, "SHARE", 2**17)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x_RD = torch.empty(2048, 512)
    blocks = list(rows._blocks(x_RD))
    assert len(blocks) == number
    assert sum(len(x_RD[block]) for block in blocks) == len(x_RD)
