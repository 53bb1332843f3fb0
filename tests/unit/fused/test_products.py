"""Products by either library against fp64: values and gradients, odd shapes, views, no rows."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fused import products
from fused.products import add_product_, linear, product

SHAPES = [(1, 1, 1), (3, 5, 7), (33, 64, 17), (2, 300, 129), (0, 4, 6)]


@pytest.fixture(autouse=True, params=[False, True], ids=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    torch.manual_seed(0)
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found.double() - wanted).norm() <= 2e-6 * wanted.norm().clamp(min=1.0))


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_linear_and_its_gradients(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, d_out = (torch.randn(*s, generator=generator) for s in ((2, rows, inner), (columns, inner), (columns,)))
    given = [x.requires_grad_(), weight.requires_grad_()]
    exact = [value.detach().double().requires_grad_() for value in given]
    out, wanted = linear(x, weight), F.linear(exact[0], exact[1])
    assert out.shape == wanted.shape
    assert near(out, wanted)
    spread = d_out.expand(wanted.shape)  # a gradient without memory of its own
    found, right = torch.autograd.grad(out, given, spread), torch.autograd.grad(wanted, exact, spread.double())
    assert all(map(near, found, right))


def test_only_the_gradients_that_are_asked_for() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    for which in (x, weight):
        which.requires_grad_()
        (grad,) = torch.autograd.grad(linear(x, weight).sum(), [which])
        assert grad.shape == which.shape
        which.requires_grad_(False)


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_product_into_a_part_of_another(rows: int, inner: int, columns: int, turned: bool) -> None:
    a, b = torch.randn(rows, inner), torch.randn(columns, inner).T if turned else torch.randn(inner, columns)
    whole = torch.full((rows + 2, columns), -1.0)
    part = product(a, b, out=whole[1:-1])
    assert near(part, a.double() @ b.double())
    assert near(product(a, b), a.double() @ b.double())
    assert near(product(a, b, buffer=torch.empty(rows, columns)), a.double() @ b.double())
    assert whole[1:-1].equal(part)
    assert near(add_product_(torch.ones(rows, columns), a, b), 1 + a.double() @ b.double())
    assert (whole[[0, -1]] == -1).all()


def test_other_types_are_left_to_torch() -> None:
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert linear(x, weight).equal(F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_runs_repeat_bit_by_bit() -> None:
    x, weight = torch.randn(65, 130), torch.randn(77, 130)
    assert linear(x, weight).equal(linear(x.clone(), weight.clone()))


@pytest.mark.parametrize(
    "inside", [lambda: torch.device("meta"), FakeTensorMode, lambda: FlopCounterMode(display=False), torch.no_grad]
)
def test_the_choice_of_a_library_does_not_depend_on_who_asks_first(
    inside: Callable[[], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    expected = products.onednn_is_faster.__wrapped__()
    torch.set_default_dtype(torch.float64)
    try:
        with inside():
            assert products.onednn_is_faster.__wrapped__() == expected
    finally:
        torch.set_default_dtype(torch.float32)
