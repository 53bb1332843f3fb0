"""The attention kernels of fused/ beside torch's and FlashAttention's on the GPU at hand.

    python -m benchmarks.kernels [--quick] [--json FILE]

All run on the same inputs in one process, in turn, after their results have been compared with the fp64 reference:
``ours`` (Triton), torch's ``scaled_dot_product_attention`` and compiled ``flex_attention``, and FlashAttention-3 or -4
where one is installed. Figures are TFLOP/s by the usual count: 4 x queries x keys x width x heads products and sums
forward, 2.5 times that backward, half of either if causal. ``ours, carried`` merges into a running state, which the
peers would do in another launch.

Without a GPU it says so and prints what ahead-of-time compilation knows (:mod:`fused.compile`): registers, spills,
shared memory and instructions. Those are facts of the binaries and no claim about speed.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Row, arguments, compare, report
from fused import flash, reference
from fused.mask import CAUSAL, FULL, BlockMask

ROUNDS = 20
# Relative Frobenius error of bf16 results. Peers round the output as well, hence the room.
BOUND = 1e-2


@dataclass(frozen=True)
class Case:
    seq: int
    heads: int
    kv_heads: int
    width: int
    causal: bool
    batch: int = 1

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.batch} x {self.seq} tokens, heads {self.heads}:{self.kv_heads} x {self.width}, {kind}"

    @property
    def forward_flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.width * self.seq**2 / (2 if self.causal else 1)


QUICK = [Case(4096, 32, 8, 128, causal=True)]
FULL_SET = [
    Case(seq, 32, kv_heads, width, causal)
    for width in (64, 128)
    for kv_heads in (32, 8)
    for seq in (2048, 8192, 32768)
    for causal in (True, False)
]


@dataclass(frozen=True)
class Problem:
    """A case's tensors ``[batch, seq, heads, width]`` in bf16, its mask, and its exact statistics."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    mask: BlockMask

    @staticmethod
    def of(case: Case) -> "Problem":
        generator = torch.Generator("cuda").manual_seed(0)
        heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        q, k, v, d_out = (
            torch.randn(case.batch, case.seq, n, case.width, device="cuda", generator=generator).to(torch.bfloat16)
            for n in heads
        )
        position = np.arange(case.seq)
        rule = CAUSAL if case.causal else FULL
        return Problem(case, q, k, v, d_out, BlockMask.of(rule.ranges(position, case.seq), position, position))

    @property
    def scale(self) -> float:
        return self.case.width**-0.5


Forward = Callable[[], Tensor]
Backward = Callable[[], tuple[Tensor, Tensor, Tensor]]


def ours(problem: Problem) -> dict[str, tuple[Forward, Backward | None]]:
    from fused import triton_block
    from fused.triton_block import Block, Upstream

    block = Block(problem.q, problem.k, problem.v, problem.mask, problem.scale)
    out, lse = triton_block.forward(block)
    upstream = Upstream(problem.d_out, lse, (out * problem.d_out).sum(-1))
    running = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))

    def carried() -> Tensor:
        running[1].fill_(-torch.inf)
        return triton_block.forward(block, running)[0]

    def forward() -> Tensor:
        return triton_block.forward(block)[0]

    return {"ours": (forward, lambda: triton_block.backward(block, upstream)), "ours, carried": (carried, None)}


def flash_attention(problem: Problem) -> dict[str, tuple[Forward, Backward | None]]:
    found = flash.find(problem.q, problem.v, problem.mask)
    if found is None:
        return {}
    library, causal = found
    q, k, v, scale = problem.q, problem.k, problem.v, problem.scale
    out, lse = library.forward(q, k, v, scale, causal)
    delta = (out.float() * problem.d_out.float()).sum(-1)

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return library.backward(q, k, v, problem.d_out, lse, delta, scale, causal)

    return {type(library).__name__: (lambda: library.forward(q, k, v, scale, causal)[0], backward)}


def torch_attention(problem: Problem) -> dict[str, tuple[Forward, Backward | None]]:
    """torch's own two, through autograd, with heads before rows as they want them."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = problem.case
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    d_out = problem.d_out.transpose(1, 2).contiguous()

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    blocks = create_block_mask(causal, None, None, case.seq, case.seq, device="cuda") if case.causal else None
    compiled: Any = torch.compile(flex_attention)

    def sdpa() -> Tensor:
        q, k, v = leaves
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)

    def flex() -> Tensor:
        return compiled(*leaves, block_mask=blocks, enable_gqa=case.heads != case.kv_heads)

    def pair(call: Forward) -> tuple[Forward, Backward]:
        out = call()

        def backward() -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

        return (lambda: call().detach().transpose(1, 2)), backward

    return {"sdpa": pair(sdpa), "flex": pair(flex)}


def check(problem: Problem, variants: dict[str, tuple[Forward, Backward | None]]) -> None:
    """Compare one query head and the key head it reads with the fp64 reference; a wrong variant ends the benchmark."""
    group = problem.case.heads // problem.case.kv_heads
    q, d_out = (x[:, :, :group].double() for x in (problem.q, problem.d_out))
    k, v = (x[:, :, :1].double() for x in (problem.k, problem.v))
    out, lse = reference.forward(q, k, v, problem.mask, problem.scale)
    delta = (out * d_out).sum(-1)
    dq, dk, dv = reference.backward(q, k, v, d_out, lse, delta, problem.mask, problem.scale)
    for name, (forward, backward) in variants.items():
        results = [forward()[:, :, :group]]
        exact = [out]
        if backward is not None:
            found = backward()
            results += [found[0][:, :, :group], found[1][:, :, :1], found[2][:, :, :1]]
            exact += [dq, dk, dv]
        for result, truth in zip(results, exact, strict=True):
            error = ((result.double() - truth).norm() / truth.norm()).item()
            if not error < BOUND:
                raise SystemExit(f"{name} is wrong on {problem.case}: relative error {error:.2e}")


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each call between GPU events; the calls take turns, after three rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(ROUNDS + 3):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            if index >= 3:
                times[name].append(start.elapsed_time(stop) / 1000)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(case: Case) -> list[Row]:
    problem = Problem.of(case)
    variants = ours(problem) | torch_attention(problem) | flash_attention(problem)
    check(problem, variants)
    forward = seconds({name: pair[0] for name, pair in variants.items()})
    backward = seconds({name: pair[1] for name, pair in variants.items() if pair[1] is not None})
    rows: list[Row] = []
    for metric, times, flops in (
        ("forward TFLOP/s", forward, case.forward_flops),
        ("backward TFLOP/s", backward, 2.5 * case.forward_flops),
    ):
        rates = {name: flops / time / 1e12 for name, time in times.items()}
        rows += [
            compare(str(case), metric, rates["ours"], rate, name, less_is_better=False)
            for name, rate in rates.items()
            if name != "ours"
        ]
    return rows


def main() -> None:
    options = arguments(__doc__ or "")
    if not torch.cuda.is_available():
        from fused.compile import recorded, table

        print("No GPU here, so no speed is measured. What compilation ahead of time found, by target:\n")
        print("\n".join(table(recorded()[1])))
        return
    rows = [row for case in (QUICK if options.quick else FULL_SET) for row in measure(case)]
    report(rows, options.json, f"Attention kernels on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
