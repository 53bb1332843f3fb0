"""attend() on one process: exact, and its arguments are checked with the rule and the fix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from parallel.attention import STRATEGIES, SequenceParallelCore, attend
from tests.helpers.attention import Case, make, oracle, relative_error


def _call(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Tensor:
    return attend(q, k, v, **({"group": None, "strategy": "local", "layout": "zigzag"} | changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("documents", ["none", "random", "padded"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_single_rank_needs_no_process_group(strategy: str, documents: str, causal: bool) -> None:
    case = Case(strategy, "zigzag", causal, 4, 2, documents, 31)
    tensors = make(case, 1)
    exact = oracle(case, tensors)
    q, k, v = (x.clone().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    out = _call(q, k, v, strategy=strategy, causal=causal, document_ids=tensors.document_ids)
    gradients = torch.autograd.grad(out, (q, k, v), tensors.d_out)
    for ours, wanted in zip((out, *gradients), (exact.out, exact.dq, exact.dk, exact.dv), strict=True):
        assert relative_error(ours, wanted) < 5e-6


def test_gradients_agree_with_finite_differences() -> None:
    case = Case("token_ring", "contiguous", True, 2, 1, "random", 6, batch=1, head_dim=3, dtype=torch.float64)
    tensors = make(case, 1)
    inputs = [x.requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    assert torch.autograd.gradcheck(lambda q, k, v: _call(q, k, v, document_ids=tensors.document_ids), inputs)


def test_the_core_is_causal_attention() -> None:
    case = Case("ring", "contiguous", True, 4, 4, "random", 12)
    tensors = make(case, 1)
    out = SequenceParallelCore(None, "ring", "contiguous")(tensors.q, tensors.k, tensors.v, tensors.document_ids)
    assert relative_error(out, oracle(case, tensors).out) < 5e-6


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "changes", "message"),
    [
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"strategy": "tokenring"}, "did you mean token_ring"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"layout": "zigzack"}, "did you mean zigzag"),
        (_x(4, 2, 8), _x(4, 2, 8), _x(4, 2, 8), {}, r"\[batch, local_seq, heads, head_dim\]"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 1, 8), {}, "k and v have one shape"),
        (_x(1, 4, 2, 8), _x(1, 5, 2, 8), _x(1, 5, 2, 8), {}, "agree in all but the heads"),
        (_x(1, 4, 3, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {}, "k's heads divide q's heads"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8, dtype=torch.bfloat16), {}, "one floating-point dtype"),
        (_x(1, 0, 2, 8), _x(1, 0, 2, 8), _x(1, 0, 2, 8), {}, "at least one token"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"document_ids": _x(1, 5).long()}, r"\[1, 4\]"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"document_ids": _x(1, 4)}, r"document_ids\.long"),
    ],
)
def test_wrong_arguments_are_named(q: Tensor, k: Tensor, v: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _call(q, k, v, **changes)
