"""What cutting attention into blocks costs on a CPU: one call of the kernel beside the blocks that a rank computes.

    python -m benchmarks.blocks [--quick] [--json FILE]

``N shards``: the queries of one of N ranks against all keys, once in one call of torch's fused operator and once as N
blocks of :mod:`fused.block`, merged as the engine merges them; forward, and backward from the row sums that a ring
has in place of the output. ``one rank``: :func:`parallel.attention.attend` on a sequence that is not split beside
torch's ``scaled_dot_product_attention``, through autograd. Figures are CPU time of this process, in turns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Row, alternate, arguments, paired, report
from fused.block import block_backward, block_forward
from fused.mask import CAUSAL, FULL, BlockMask
from parallel.attention import attend

SEQ, HEADS, WIDTH = 4096, 8, 64
SHARDS = (1, 2, 4, 8)
BOUND = 1e-5
_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _normal(seq: int) -> Tensor:
    return torch.randn(1, seq, HEADS, WIDTH)


def _agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        error = ((x - y).abs().max() / y.abs().max()).item()
        if not error < BOUND:
            raise SystemExit(f"the blocks are wrong: relative error {error:.2g}")


def sharded(shards: int, rounds: int) -> list[Row]:
    """One call beside the blocks of ``shards`` ranks."""
    size = SEQ // shards
    q, d_out, k, v = _normal(size), _normal(size), _normal(SEQ), _normal(SEQ)
    scale, place = WIDTH**-0.5, np.arange(size)
    mask = BlockMask.of(FULL.ranges(place, size), place, place)
    heads_first = [x.transpose(1, 2) for x in (q, k, v, d_out)]
    out, lse = (x.transpose(1, 2) for x in _forward(*heads_first[:3], 0.0, scale=scale))
    delta = torch.linalg.vecdot(d_out, out)
    parts = list(zip(k.split(size, 1), v.split(size, 1), strict=True))

    def forward_blocks() -> tuple[Tensor, ...]:
        total = None
        for keys, values in parts:
            total = block_forward(q, keys.contiguous(), values.contiguous(), mask, scale, total)
        assert total is not None, "there are shards"
        return total

    def forward_once() -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2) for x in _forward(*heads_first[:3], 0.0, scale=scale))

    def backward_blocks() -> tuple[Tensor, ...]:
        dq, found = None, []
        for keys, values in parts:
            keys, values = keys.contiguous(), values.contiguous()
            dq, *dkv = block_backward(q, keys, values, d_out, lse, delta, mask, scale, dq)
            found.append(dkv)
        assert dq is not None, "there are shards"
        return (dq, *(torch.cat(x, 1) for x in zip(*found, strict=True)))

    def backward_once() -> tuple[Tensor, ...]:
        statistics = out.transpose(1, 2), lse.transpose(1, 2)
        return tuple(
            x.transpose(1, 2)
            for x in _backward(heads_first[3], *heads_first[:3], *statistics, 0.0, is_causal=False, scale=scale)
        )

    rows: list[Row] = []
    pairs = {"forward": (forward_blocks, forward_once), "backward": (backward_blocks, backward_once)}
    for direction, (ours, theirs) in pairs.items():
        _agree(ours(), theirs())
        times = alternate({"ours": ours, "one call": theirs}, rounds)
        label = f"{shards} shards of {size} x {size}"
        rows.append(paired(label, f"{direction}, CPU ms", times["ours"].cpu, times["one call"].cpu, "one call"))
    return rows


def one_rank(rounds: int) -> list[Row]:
    """A sequence that is not split."""
    rows: list[Row] = []
    for kind, mask in (("full", FULL), ("causal", CAUSAL)):
        q, k, v = (_normal(SEQ // 2).requires_grad_() for _ in range(3))
        d_out = _normal(SEQ // 2)

        def ours(mask: Any = mask, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attend(q, k, v, group=None, strategy="ring", layout="contiguous", mask=mask)

        def theirs(causal: bool = kind == "causal", q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)

        def gradients(call: Callable[[], Tensor], inputs: Any = (q, k, v), d_out: Tensor = d_out) -> Any:
            return torch.autograd.grad(call(), inputs, d_out)

        _agree((ours(), *gradients(ours)), (theirs(), *gradients(theirs)))
        for what, mine, other in (
            ("forward", ours, theirs),
            ("forward + backward", lambda f=ours: gradients(f), lambda f=theirs: gradients(f)),
        ):
            times = alternate({"ours": mine, "sdpa": other}, rounds)
            label = f"one rank, {SEQ // 2} tokens, {kind}"
            rows.append(paired(label, f"{what}, CPU ms", times["ours"].cpu, times["sdpa"].cpu, "sdpa"))
    return rows


def main() -> None:
    options = arguments("What cutting attention into blocks costs on a CPU")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 3 if options.quick else 9
    rows = [row for shards in SHARDS for row in sharded(shards, rounds)] + one_rank(rounds)
    report(rows, options.json, f"Blocks beside one call, {HEADS} heads of {WIDTH}, fp32, one thread")


if __name__ == "__main__":
    main()
