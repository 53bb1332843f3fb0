"""attend() on one process: exact, one node for torch, and its arguments are checked with the rule and the fix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from fused.mask import CAUSAL, FULL, Mask
from parallel.attention import STRATEGIES, SequenceParallelCore, attend
from parallel.layout import contiguous
from parallel.ring import operator
from tests.helpers.attention import Case, make, oracle, relative_error


def _call(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Tensor:
    return attend(q, k, v, **({"group": None, "strategy": "local", "layout": "zigzag"} | changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("mask", [CAUSAL, FULL, Mask(left=4, right=2)])
def test_a_single_rank_needs_no_process_group(strategy: str, documents: str, mask: Mask) -> None:
    case = Case(strategy, 1, mask=mask, documents=documents, keys=31)
    tensors, exact = make(case), oracle(case)
    q, k, v = (x.clone().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    out = _call(q, k, v, strategy=strategy, mask=mask, document_ids=tensors.documents)
    gradients = torch.autograd.grad(out, (q, k, v), tensors.d_out)
    for ours, wanted in zip((out, *gradients), (exact.out, exact.dq, exact.dk, exact.dv), strict=True):
        assert relative_error(ours, wanted) < 5e-6


def test_gradients_agree_with_finite_differences() -> None:
    case = Case("", 1, heads=2, kv_heads=1, documents="random", keys=6, batch=1, head_dim=3, dtype=torch.float64)
    tensors = make(case)
    inputs = [x.clone().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    assert torch.autograd.gradcheck(lambda q, k, v: _call(q, k, v, document_ids=tensors.documents), inputs)


def test_new_tokens_behind_a_cached_prefix() -> None:
    case = Case("", 1, keys=20, queries=6)
    tensors = make(case)
    out = _call(*(tensors.q, tensors.k, tensors.v), layout=contiguous(6, 1).shifted(14), key_layout=contiguous(20, 1))
    assert relative_error(out, oracle(case).out) < 5e-6


def test_the_core_is_causal_attention_and_compiles_into_one_graph() -> None:
    case = Case("", 1, kv_heads=4, documents="random", keys=12)
    tensors, exact = make(case), oracle(case)
    core = SequenceParallelCore(None, "ring", "contiguous")
    inputs = [x.clone().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]

    def layer(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        return core(q * 1.0, k, v, documents) + 0.0

    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, tensors.documents)
    assert relative_error(out.detach(), exact.out) < 5e-6
    assert relative_error(torch.autograd.grad(out, inputs, tensors.d_out)[0], exact.dq) < 5e-6


@pytest.mark.parametrize("documents", [False, True])
def test_the_operator_keeps_torchs_rules(documents: bool) -> None:
    case = Case("", 1, documents="random", keys=9, value_dim=6)
    tensors = make(case)
    _call(tensors.q, tensors.k, tensors.v)  # its place is known from here on
    place = max(operator._calls)
    inputs = [x.clone().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    ids = tensors.documents if documents else None
    torch.library.opcheck(operator.attention, (*inputs, ids, place, 0))


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "changes", "message"),
    [
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"strategy": "tokenring"}, "did you mean token_ring"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"strategy": "tile:2"}, "divides the ranks of the group, 1"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"layout": "zigzack"}, "did you mean zigzag"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"layout": contiguous(8, 2)}, "the 1 ranks of the group"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"layout": contiguous(5, 1)}, "holds 5 queries and 5 keys"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"dropout": 1.0}, "below 1"),
        (_x(4, 2, 8), _x(4, 2, 8), _x(4, 2, 8), {}, r"\[batch, local_seq, heads, head_dim\]"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 1, 8), {}, "k and v agree in all but the head_dim"),
        (_x(1, 4, 2, 8), _x(2, 4, 2, 8), _x(2, 4, 2, 8), {}, "q and k agree in batch and head_dim"),
        (_x(1, 4, 3, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {}, "k's heads divide q's heads"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8, dtype=torch.bfloat16), {}, "one floating-point dtype"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"document_ids": _x(1, 5).long()}, r"\[1, 4\]"),
        (_x(1, 4, 2, 8), _x(1, 4, 2, 8), _x(1, 4, 2, 8), {"document_ids": _x(1, 4)}, r"document_ids\.long"),
    ],
)
def test_wrong_arguments_are_named(q: Tensor, k: Tensor, v: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _call(q, k, v, **changes)


def test_an_empty_sequence_is_an_empty_result() -> None:
    assert _call(_x(1, 0, 2, 8), _x(1, 0, 2, 8), _x(1, 0, 2, 8)).shape == (1, 0, 2, 8)
