"""Every strategy, alone and in every setting, equals attention from its definition in fp64, forward and backward.

The ranks are threads of one process; tests/distributed/test_attention.py runs a part of this over gloo.
"""

from dataclasses import replace

import pytest
import torch

from fused.mask import FULL, Mask
from parallel.strategies import STRATEGIES
from tests.helpers.attention import Case, errors, make, oracle, run_in_memory

FP32_BOUND = 5e-6  # of the largest value
NAMES = (*(name for name in STRATEGIES if name != "local"), "tile:2", "hybrid:2:token_ring", "tile/bidirectional_query")

SETTINGS: dict[str, Case] = {
    "full": Case("", 0, mask=FULL, layout="contiguous"),
    "causal": Case("", 0),
    "window": Case("", 0, mask=Mask(left=9, right=0), layout="contiguous"),
    "two-sided window": Case("", 0, mask=Mask(left=5, right=12)),
    "prefix": Case("", 0, mask=Mask(right=0, prefix=17)),
    "documents": Case("", 0, documents="random"),
    "balanced documents": Case("", 0, documents="random", layout="balanced"),
    "padding": Case("", 0, documents="padded", layout="contiguous"),
    "one-token documents": Case("", 0, documents="single"),
    "windowed documents": Case("", 0, documents="random", mask=Mask(left=3, right=1)),
    "multi-head": Case("", 0, kv_heads=4, keys=32),
    "multi-query": Case("", 0, heads=3, kv_heads=1),
    "wide values": Case("", 0, head_dim=6, value_dim=10, kv_heads=4),
    "narrow values": Case("", 0, head_dim=10, value_dim=4, mask=FULL),
    "cached prefix": Case("", 0, queries=11),
    "cached prefix, window": Case("", 0, queries=20, mask=Mask(left=6, right=0), layout="contiguous"),
    "lopsided shards": Case("", 0, layout="lopsided"),
    "fewer tokens than ranks": Case("", 0, keys=3, batch=1),
    "empty rows": Case("", 0, mask=Mask(left=4, right=-2)),
    "scaled": Case("", 0, scale=0.7, batch=1),
}
STRIDES = {4: 1, 2: 2, 8: 2}  # by ranks: a setting meets every strategy, every second, else every third


def _applies(name: str, ranks: int) -> bool:
    return ranks % 2 == 0 or ":2" not in name


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_strategy_is_exact(setting: str, ranks: int) -> None:
    names = [name for name in NAMES if _applies(name, ranks)] + (["local"] if ranks == 1 else [])
    thinned = STRIDES.get(ranks, 3)
    names = names[list(SETTINGS).index(setting) % thinned :: thinned]
    exact = oracle(SETTINGS[setting])
    for name in names:
        case = replace(SETTINGS[setting], strategy=name, ranks=ranks)
        ours, _ = run_in_memory(case)
        found = errors(ours, exact)
        assert max(found.values()) < FP32_BOUND, f"{case}: {found}"


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_stays_double(name: str) -> None:
    case = Case(name, 4, dtype=torch.float64)
    found = errors(run_in_memory(case)[0], oracle(case))
    assert max(found.values()) < 1e-13, found


def _rms(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_about_once_however_many_ranks(name: str) -> None:
    base = Case(name, 0, mask=FULL, layout="contiguous", dtype=torch.bfloat16, keys=64, kv_heads=4, head_dim=16)
    exact = oracle(base)
    floors = {part: _rms(x.bfloat16(), x) for part, x in exact.named().items()}
    for ranks in (2, 8):
        ours, _ = run_in_memory(replace(base, ranks=ranks))
        for part in ("out", "dq", "dk", "dv"):
            assert _rms(ours.named()[part], exact.named()[part]) < 1.5 * floors[part], (ranks, part)
        assert _rms(ours.lse, exact.lse) < 1e-6


def test_dropout_is_the_same_for_every_strategy_and_number_of_ranks() -> None:
    base = Case("", 0, dropout=0.3)
    exact = oracle(base)
    for ranks in (1, 3, 4):
        for name in NAMES:
            if _applies(name, ranks):
                found = errors(run_in_memory(replace(base, strategy=name, ranks=ranks))[0], exact)
                assert max(found.values()) < FP32_BOUND, (name, ranks, found)


@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_bit_by_bit(name: str) -> None:
    case = Case(name, 4, documents="random", dtype=torch.bfloat16)
    (first, _), (second, _) = run_in_memory(case), run_in_memory(case)
    for part, x in first.named().items():
        assert torch.equal(x, second.named()[part]), part


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_in_one_shard_spreads_as_in_one_process(name: str) -> None:
    """Every query that sees the bad key among others is NaN, those before it are as they were, and nothing hangs."""
    case = Case(name, 4, layout="contiguous", batch=1, keys=40)
    clean, _ = run_in_memory(case)
    tensors = make(case)
    saved = tensors.k[0, 25].clone()
    tensors.k[0, 25] = torch.nan
    try:
        ours, _ = run_in_memory(case)
    finally:
        tensors.k[0, 25] = saved
    assert ours.out[0, 26:].isnan().all()
    assert torch.allclose(ours.out[0, :25], clean.out[0, :25], atol=1e-6)
