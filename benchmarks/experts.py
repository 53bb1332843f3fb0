"""Layers of experts on one CPU thread against a dense layer of equal active FLOPs and other ways to compute them.

    python -m benchmarks.experts [--quick] [--json FILE]

Forward and backward pass, by CPU time. Peers, all with the same weights and timed round by round beside ours:

- ``dense``: the SwiGLU layer that every token would pass through without experts.
- ``indexed loop``: the loop over experts that peers use, with the stacked weight indexed in the loop and a functional
  index_add; its backward pass makes a gradient of the whole stack for every expert.
- ``grouped_mm``: torch's grouped matrix product on gathered rows.
- ``padded``: a batched product in which every expert has as many rows as the busiest, under a skewed load.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Row, alternate, arguments, paired, report
from fused.grouped import mix_experts
from models.decoder import Decoder, ModelSpec
from models.mlp import SwiGLU
from models.moe.exchange import LocalExchange, rows_of
from models.moe.layer import ExpertLayer
from models.moe.router import Routing
from models.spec import ExpertSpec

TOKENS, DIM, FFN, EXPERTS = 4096, 512, 1376, 8
SKEW = 1.5  # exponent of the Zipf law that the skewed load follows
STEP_LAYERS, STEP_CONTEXT, STEP_WINDOWS = 2, 512, 8


def spec_of(groups: tuple[int, ...], layers: int = 1) -> ModelSpec:
    experts = ExpertSpec(groups=groups)
    two = {"modalities": ("text", "image"), "modality_tokens": (256,)}
    return ModelSpec(1024, DIM, layers, 8, 8, DIM // 8, FFN, experts=experts, **two)


def backward(out: Tensor, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def indexed_loop(x: Tensor, rows: Tensor, gates: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    out, start = torch.zeros_like(x), 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        gate, up = (x[rows[part]] @ gate_up[expert].T).chunk(2, 1)
        out = out.index_add(0, rows[part], (F.silu(gate) * up) @ down[expert].T * gates[part, None])
        start += count
    return out


def grouped_mm(x: Tensor, rows: Tensor, gates: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[rows], gate_up.transpose(1, 2), offs=ends).chunk(2, 1)
    out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, rows, out * gates[:, None])


def padded(x: Tensor, rows: Tensor, gates: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    most = max(counts)
    places = torch.cat([torch.arange(n) + e * most for e, n in enumerate(counts)])
    boxes = x.new_zeros(len(counts) * most, x.shape[1]).index_copy(0, places, x[rows])
    gate, up = torch.bmm(boxes.view(len(counts), most, -1), gate_up.transpose(1, 2)).chunk(2, 2)
    out = torch.bmm(F.silu(gate) * up, down.transpose(1, 2)).flatten(0, 1)[places]
    return torch.zeros_like(x).index_add(0, rows, out * gates[:, None])


def zipf_choice(tokens: int, experts: int) -> Tensor:
    """One expert a token, loads by Zipf's law."""
    weights = 1.0 / torch.arange(1, experts + 1, dtype=torch.float64) ** SKEW
    picks = torch.multinomial(weights, tokens, replacement=True, generator=torch.Generator().manual_seed(0))
    return F.one_hot(picks, experts).bool()


Variants = dict[str, Callable[[], list[Tensor]]]


def products(chosen: Tensor, names: list[str]) -> Variants:
    """The experts alone, for given choices: ours and peers."""
    generator = torch.Generator().manual_seed(0)
    rows, counts = rows_of(chosen)
    x, d_out = (torch.randn(TOKENS, DIM, generator=generator) for _ in range(2))
    shapes = ((EXPERTS, 2 * FFN, DIM), (EXPERTS, DIM, FFN))
    gate_up, down = (torch.randn(*shape, generator=generator).mul_(0.02).requires_grad_() for shape in shapes)
    inputs = [x.requires_grad_(), torch.rand(len(rows), generator=generator).requires_grad_(), gate_up, down]
    peers = {"indexed loop": indexed_loop, "grouped_mm": grouped_mm, "padded": padded}
    variants: Variants = {
        "ours": lambda: backward(mix_experts(x, rows, inputs[1], counts, [(gate_up, down)]), inputs, d_out)
    }
    for name in names:
        call = peers[name]
        variants[name] = lambda call=call: backward(call(x, rows, inputs[1], counts, gate_up, down), inputs, d_out)
    for name in names:
        for mine, other in zip(variants["ours"](), variants[name](), strict=True):
            error = ((mine - other).abs().max() / other.abs().max()).item()
            if not error < 1e-4:
                raise AssertionError(f"{name} and ours differ by {error:.2g}")
    return variants


def layers() -> Variants:
    """A whole layer, routing included, and the dense layer of equal active FLOPs."""
    torch.manual_seed(0)
    x, d_out = torch.randn(1, TOKENS, DIM, requires_grad=True), torch.randn(1, TOKENS, DIM)
    dense = SwiGLU(spec_of(()))
    variants: Variants = {"dense": lambda: backward(dense(x), [x, *dense.parameters()], d_out)}
    kinds = (torch.arange(TOKENS) // 64 % 2)[None]
    for name, groups in (("8 experts", (EXPERTS,)), ("4t4i", (4, 4))):
        layer = ExpertLayer(spec_of(groups), 0, Routing())
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        index, _ = LocalExchange().places(1, TOKENS, 0, x.device)
        tokens = LocalExchange().tokens(kinds, index, groups, TOKENS)
        variants[name] = lambda layer=layer, tokens=tokens: backward(layer(x, tokens), [x, *layer.parameters()], d_out)
    return variants


def steps() -> Variants:
    """A training step of a model, dense and with experts: forward, backward, AdamW."""
    variants: Variants = {}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (STEP_WINDOWS, STEP_CONTEXT), generator=generator)
    positions = torch.arange(STEP_CONTEXT).expand(STEP_WINDOWS, STEP_CONTEXT)
    for name, groups in (("dense", ()), ("4t4i", (4, 4))):
        model = Decoder(spec_of(groups, layers=STEP_LAYERS)).initialise(0)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step(model: Decoder = model, optimizer: torch.optim.Optimizer = optimizer) -> list[Tensor]:
            total, count = model.loss(tokens, tokens.roll(-1, 1), positions)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            return [total.detach()]

        variants[name] = step
    return variants


def rows_against(variants: Variants, ours: list[str], peers: list[str], case: str, rounds: int) -> list[Row]:
    times = alternate(variants, rounds)
    what = "CPU ms"
    return [paired(f"{case}: {a}", what, times[a].cpu, times[b].cpu, b) for a in ours for b in peers]


def main() -> None:
    options = arguments("Layers of experts against dense layers and other ways to compute them, on one CPU thread")
    torch.set_num_threads(1)
    rounds = 5 if options.quick else 15
    size = f"{TOKENS} tokens, {EXPERTS} experts of {DIM} x {FFN}"
    scores = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    taken = scores.argsort(0, descending=True).argsort(0) < TOKENS // EXPERTS
    rows = rows_against(layers(), ["8 experts", "4t4i"], ["dense"], f"layer with its router, {size}", rounds)
    even = products(taken, ["indexed loop", "grouped_mm"])
    rows += rows_against(even, ["ours"], ["indexed loop", "grouped_mm"], f"even load, {size}", rounds)
    skewed = products(zipf_choice(TOKENS, EXPERTS), ["padded", "grouped_mm"])
    rows += rows_against(skewed, ["ours"], ["padded", "grouped_mm"], f"Zipf load, {size}", rounds)
    shape = f"{STEP_LAYERS} layers of {DIM}, {STEP_WINDOWS} x {STEP_CONTEXT} tokens, AdamW"
    rows += rows_against(steps(), ["4t4i"], ["dense"], f"training step, {shape}", rounds)
    report(rows, options.json, "Experts on one CPU thread")


if __name__ == "__main__":
    main()
