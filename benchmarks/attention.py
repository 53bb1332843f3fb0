"""Sequence-parallel attention on gloo ranks against what else computes it on a CPU.

    python -m benchmarks.attention [--quick] [--json FILE]

Peers, all timed in the same processes, round by round beside ours:

- ``torch ring``: the ring attention of torch's own context parallelism (torch.distributed.tensor.experimental), called
  directly with the fused CPU op since its public door has no CPU path. It gets the layout that it is written for
  (batch, heads, sequence, head_dim), its load balancing (the same zigzag) and whichever of its two ways of exchanging
  keys is faster here.
- ``sdpa, N threads``: scaled_dot_product_attention on the whole sequence in one process with as many threads as there
  are ranks: what the machine can do without splitting the sequence.
- ``sdpa, 1 thread``: the same with one thread.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_cp

from benchmarks.table import Row, Times, alternate, arguments, paired, report
from fused.mask import CAUSAL, Mask
from parallel.attention import attend
from parallel.layout import named_layout
from parallel.strategies import STRATEGIES
from tests.helpers.dist import run_distributed

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
OURS = ("token_ring", "ring", *(name for name in STRATEGIES if name not in ("token_ring", "ring", "local")))
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    ranks: int
    seq: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.seq} tokens, heads {self.heads}:{self.kv_heads} x {self.head_dim}"
        return f"{self.ranks} ranks, {shape}, {kind}, {dtype}"


QUICK = [Case(2, 2048)]
FULL = [
    Case(2, 2048),
    Case(2, 4096),
    Case(2, 2048, kv_heads=2),
    Case(2, 2048, causal=False),
    Case(4, 2048),
    Case(2, 512, dtype=torch.bfloat16),
]

Result = list[Tensor]  # out, and dq, dk, dv where the backward pass is timed too; whole or this rank's part

Variants = dict[str, Callable[[], Result]]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, case: Case, backward: bool, threads: int) -> Result:
    """Whole sequence, one process; tensors are [batch, heads, seq, head_dim]."""
    torch.set_num_threads(threads)
    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    grouped = case.heads != case.kv_heads
    out = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=case.causal, enable_gqa=grouped)
    gradients = torch.autograd.grad(out, inputs, d_out) if backward else ()
    torch.set_num_threads(1)
    return [out.detach(), *gradients]


def _ours(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, case: Case, backward: bool, strategy: str, layout: str
) -> Result:
    """This rank's shard, [batch, seq, heads, head_dim]."""
    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    out = attend(
        *(inputs[0], inputs[1], inputs[2]),
        group=dist.group.WORLD,
        strategy=strategy,
        layout=layout,
        mask=CAUSAL if case.causal else Mask(),
    )
    return [out.detach(), *(torch.autograd.grad(out, inputs, d_out) if backward else ())]


def _torch_ring(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, case: Case, backward: bool, rotate: str) -> Result:
    """This rank's shard, [batch, heads, seq, head_dim]."""
    torch_cp.set_rotate_method(rotate)
    torch_cp._cp_options.enable_load_balance = case.causal

    def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
        return _flash(query, key, value, 0.0, is_causal)

    def gradient(**kwargs: Any) -> tuple[Tensor, ...]:
        return _flash_backward(dropout_p=0.0, **kwargs)

    group: Any = dist.group.WORLD
    op: Any = forward
    out, lse = torch_cp._templated_ring_attention(group, 2, op, q, k, v, is_causal=case.causal)
    if not backward:
        return [out]
    op = gradient
    return [
        out,
        *torch_cp._templated_ring_attention_backward(
            group, 2, op, d_out, "grad_out", q, k, v, out, lse, is_causal=case.causal
        ),
    ]


def _variants(case: Case, rank: int, backward: bool) -> tuple[Variants, Callable[[str, Result], Result]]:
    """What is timed, by name, and how to bring a whole-sequence result to the shape of a variant's own."""
    generator = torch.Generator().manual_seed(0)
    sizes = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    whole = [torch.randn(1, case.seq, h, case.head_dim, generator=generator).to(case.dtype) for h in sizes]
    layout = "zigzag" if case.causal else "contiguous"
    split = named_layout(layout, case.seq, case.ranks)
    local = [split.shard(x, 1, rank) for x in whole]
    heads_first = [x.transpose(1, 2).contiguous() for x in local]
    whole_first = [x.transpose(1, 2).contiguous() for x in whole]
    variants: Variants = {}
    for name in OURS:
        variants[name] = lambda name=name: _ours(*_four(local), case, backward, name, layout)
    for rotate in ("allgather", "alltoall"):
        variants[f"torch ring ({rotate})"] = lambda rotate=rotate: _torch_ring(
            *_four(heads_first), case, backward, rotate
        )
    for threads in (case.ranks, 1):
        variants[f"sdpa, {threads} thread{'s' * (threads > 1)}"] = lambda threads=threads: (
            _sdpa(*_four(whole_first), case, backward, threads) if rank == 0 else []
        )

    def expected(name: str, result: Result) -> Result:
        if name.startswith("sdpa"):
            return result
        parts = [split.shard(x, 2, rank) for x in result]
        return parts if name.startswith("torch") else [x.transpose(1, 2) for x in parts]

    return variants, expected


def _four(x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[0], x[1], x[2], x[3]


def _check(variants: Variants, expected: Callable[[str, Result], Result], case: Case) -> None:
    """Every variant agrees with one-process attention, before anything is timed."""
    single: list[Any] = [variants["sdpa, 1 thread"]()]
    dist.broadcast_object_list(single, 0)
    for name, variant in variants.items():
        ours = variant()
        if not ours:
            continue  # one-process attention is rank 0's business
        for index, (mine, exact) in enumerate(zip(ours, expected(name, single[0]), strict=True)):
            error = ((mine - exact).abs().max() / exact.abs().max().clamp_min(1.0)).item()
            if not error <= BOUND[case.dtype]:
                raise AssertionError(f"{case}: {name} is wrong, result {index} is off by {error:.2g}")


def _rank(rank: int, world_size: int, cases: list[Case], rounds: int) -> list[dict[str, Times]]:
    """Times by case and direction, forward then forward with backward."""
    results: list[dict[str, Times]] = []
    for case in cases:
        for backward in (False, True):
            variants, expected = _variants(case, rank, backward)
            _check(variants, expected, case)
            results.append(alternate(variants, rounds, before=dist.barrier))
    return results


def _rows(cases: list[Case], by_rank: list[list[dict[str, Times]]]) -> list[Row]:
    """Elapsed time is the slowest rank's, CPU time the sum over ranks."""
    rows: list[Row] = []
    labels = [(case, what) for case in cases for what in ("forward", "forward + backward")]
    for index, (case, what) in enumerate(labels):
        ranks = [times[index] for times in by_rank]
        wall = {n: [max(r) for r in zip(*(t[n].wall for t in ranks), strict=True)] for n in ranks[0]}
        cpu = {n: [sum(r) for r in zip(*(t[n].cpu for t in ranks), strict=True)] for n in ranks[0]}
        best = min((n for n in wall if n.startswith("torch ring")), key=lambda n: sorted(wall[n])[len(wall[n]) // 2])
        for ours in OURS:
            for peer in (best, *(n for n in wall if n.startswith("sdpa"))):
                rows.append(paired(f"{ours}: {case}", f"{what}, ms", wall[ours], wall[peer], peer))
            for peer in (best, "sdpa, 1 thread"):
                rows.append(paired(f"{ours}: {case}", f"{what}, CPU ms", cpu[ours], cpu[peer], peer))
    return rows


def main() -> None:
    options = arguments("Sequence-parallel attention against torch's ring attention and single-process attention")
    cases, rounds = (QUICK, 5) if options.quick else (FULL, 5)
    rows: list[Row] = []
    for ranks in sorted({case.ranks for case in cases}):
        some = [case for case in cases if case.ranks == ranks]
        rows += _rows(some, run_distributed(_rank, ranks, some, rounds, timeout=3600))
    notes = [
        "The links are loopback sockets and the ranks share this machine's cores: this measures overhead, not scaling."
    ]
    if importlib.util.find_spec("ring_attention_pytorch") is None:
        notes.append("Another peer, ring-attention-pytorch, is not installed (pip install ring-attention-pytorch).")
    report(rows, options.json, "Attention over a sequence that is split over ranks", notes)


if __name__ == "__main__":
    main()
