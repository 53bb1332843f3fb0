"""Compile the Triton kernels for GPUs that are not here, and hold them to budgets that only fall.

    python -m fused.compile                  # the cases of the tests: compile and check
    python -m fused.compile --all --write    # every case; budgets fall to what was found, new cases are added
    python -m fused.compile --all --raise    # as --write, and budgets that were exceeded rise
    python -m fused.compile --table          # the recorded figures as a Markdown table

The path is the one that runs: the launches of :mod:`fused.triton_block` on meta tensors, specialised by the same JIT
for a stand-in driver. Registers, spills, shared memory and instructions are then facts of the binary. Speed is not.
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused.dropout import Dropout
from fused.mask import CAUSAL, BlockMask
from fused.triton_block import Block, Upstream, backward_launch, forward_launch, query_launch
from fused.triton_config import (
    ELEMENT_BYTES,
    EXPERT_KERNELS,
    KERNELS,
    TARGETS,
    WIDTHS,
    Target,
    expert_tiles,
    tiles,
)
from fused.triton_grouped import (
    Layer,
    Stack,
    combine_launch,
    hidden_backward_launch,
    hidden_launch,
    product_launch,
    weight_launch,
)
from fused.triton_launch import Launch
from fused.triton_merge import merge_launch

PACKAGE = Path(__file__).parent
BUDGETS = PACKAGE.parent / "tests/unit/fused/triton_budgets.json"
SEQ, HEADS, KV_HEADS = 4096, 32, 8
EXPERTS, DIM, HIDDEN = 4, 1024, 2736
# Products, asynchronous and bulk copies: mma, wgmma, tcgen05; cp.async, TMA load, store and reduce; AMD's mfma.
COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "UTMASTG", "UTMAREDG", "v_mfma")


class Case(NamedTuple):
    """One binary; ``width`` is that of a head, or of a token for the kernels of experts."""

    target: str
    kernel: str
    element_bytes: int
    width: int
    dropout: bool = False

    def __str__(self) -> str:
        dtype = "bf16" if self.element_bytes == 2 else "fp32"
        return f"{self.target} {self.kernel} {dtype} {self.width}" + (" dropout" if self.dropout else "")


@dataclass(frozen=True)
class Figures:
    """What a binary takes: registers a thread, bytes a thread spills, bytes of shared memory, chosen instructions."""

    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]


def all_cases() -> list[Case]:
    plain = [Case(t, k, b, w) for t in TARGETS for b in ELEMENT_BYTES for w in WIDTHS for k in KERNELS]
    dropped = [Case(target, kernel, 2, 128, dropout=True) for target in TARGETS for kernel in KERNELS]
    experts = [
        Case(target, kernel, size, DIM) for target in TARGETS for size in ELEMENT_BYTES for kernel in EXPERT_KERNELS
    ]
    return plain + dropped + [Case(target, "merge", 2, 128) for target in TARGETS] + experts


def test_cases() -> list[Case]:
    """What is compiled whenever the tests run; for the rest they ask that the record be of this source."""
    return [
        Case(target, kernel, 2, 256 if (target, kernel) == ("gfx942", "forward") else 128)  # the others take 15 s
        for target in TARGETS
        for kernel in ("forward", "backward")
    ] + [Case(target, "experts_hidden", 2, DIM) for target in TARGETS]


class StandIn:
    """As much of a driver as the JIT asks for before it launches."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.arch)  # the JIT keeps its binaries by device: one name for each target

    def get_current_stream(self, device: object = None) -> int:
        return 0


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(case: Case) -> Launch:
    """A causal block of a grouped-query model, its results added to running ones."""
    dtype = torch.bfloat16 if case.element_bytes == 2 else torch.float32
    q, out = (_meta(1, SEQ, HEADS, case.width, dtype=x) for x in (dtype, torch.float32))
    k, dk = (_meta(1, SEQ, KV_HEADS, case.width, dtype=x) for x in (dtype, torch.float32))
    lse = _meta(1, SEQ, HEADS)
    if case.kernel == "merge":
        return merge_launch(out, lse, [(q, lse), (q, lse), (q, lse)])
    position = np.arange(SEQ)
    mask = BlockMask.of(CAUSAL.ranges(position, SEQ), position, position)
    block = Block(q, k, k, mask, case.width**-0.5, Dropout(0.1, seed=0) if case.dropout else None)
    config = tiles(case.target, case.kernel, case.element_bytes, case.width)
    if case.kernel == "forward":
        return forward_launch(block, out, lse, True, config)
    statistics = _meta(1, HEADS, SEQ).transpose(1, 2)
    upstream = Upstream(q, statistics, statistics)
    if case.kernel == "query":
        return query_launch(block, upstream, out, True, config)
    return backward_launch(block, upstream, out, (dk, dk), True, True, config)


def expert_launch(case: Case) -> Launch:
    """A stack of experts that takes its rows from tokens."""
    dtype = torch.bfloat16 if case.element_bytes == 2 else torch.float32
    x, hidden, gate_up = (_meta(SEQ, width, dtype=dtype) for width in (DIM, HIDDEN, 2 * HIDDEN))
    matrices = (_meta(EXPERTS, 2 * HIDDEN, DIM, dtype=dtype), _meta(EXPERTS, DIM, HIDDEN, dtype=dtype))
    stack = Stack(*matrices, _meta(SEQ // 16, 3, dtype=torch.int32), _meta(EXPERTS + 1, dtype=torch.int32))
    rows, gates = _meta(SEQ, dtype=torch.int64), _meta(SEQ, dtype=dtype)
    layer = Layer(x, rows, gates, expert_tiles(case.target, case.element_bytes))
    launches = {
        "experts_hidden": lambda: hidden_launch(layer, stack, hidden, gate_up),
        "experts_product": lambda: product_launch(layer, stack, hidden, stack.down.mT, x),
        "experts_combine": lambda: combine_launch(x, rows, _meta(SEQ + 1, dtype=torch.int64), gates, x),
        "experts_backward": lambda: hidden_backward_launch(layer, stack, x, gate_up, gate_up, hidden, _meta(SEQ, 64)),
        "experts_weight": lambda: weight_launch(layer, stack, gate_up, x, stack.gate_up, "right"),
    }
    return launches[case.kernel]()


def compiled(case: Case) -> Figures:
    target = TARGETS[case.target]
    driver.set_active(StandIn(target))  # pyright: ignore[reportArgumentType]
    binary = (expert_launch if case.kernel in EXPERT_KERNELS else launch)(case).compile()
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    registers, spills, instructions = read(binary)
    return Figures(registers, spills, binary.metadata.shared, {x: instructions[x] for x in COUNTED if instructions[x]})


def _read_cubin(binary: Any) -> tuple[int, int, Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tools = knobs.nvidia
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(tools.nvdisasm.path, "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)"
    return found["REG"], found["STACK"], Counter(re.findall(pattern, code, re.M))


def _read_amdgcn(binary: Any) -> tuple[int, int, Counter[str]]:
    """Vector registers with accumulation registers among them; scalar spills go to vector registers, not to memory."""
    text = binary.asm["amdgcn"]
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return found["vgpr_count"], 4 * found["vgpr_spill_count"], Counter(re.findall(r"\bv_mfma", text))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def source() -> str:
    """A digest of what the binaries are made from, whatever its comments and layout: kernels, tiles, compiler."""
    digest = hashlib.sha256(triton.__version__.encode())
    for file in sorted(PACKAGE.glob("triton_*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [x for x in body if not _is_text(x)]  # pyright: ignore[reportAttributeAccessIssue]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def excesses(found: Figures, budget: Figures, limit: int) -> list[str]:
    """How a binary breaks its budget or its device's shared memory; an instruction may change in number, not vanish."""
    rows = [(name, getattr(found, name), getattr(budget, name)) for name in ("registers", "spills", "shared")]
    rows.append(("shared", found.shared, limit))
    lost = [f"{name} is gone" for name in budget.instructions if not found.instructions.get(name)]
    return [f"{name} {have} > {allowed}" for name, have, allowed in rows if have > allowed] + lost


def lowered(found: Figures, budget: Figures) -> Figures:
    """The budget after a run that kept it; instructions are those of this run."""
    return Figures(
        min(found.registers, budget.registers),
        min(found.spills, budget.spills),
        min(found.shared, budget.shared),
        found.instructions,
    )


def recorded(file: Path = BUDGETS) -> tuple[str, dict[str, Figures]]:
    """The digest of the source that was measured, and the budgets by case."""
    if not file.exists():
        return "", {}
    content = json.loads(file.read_text())
    return content["source"], {name: Figures(**figures) for name, figures in content["cases"].items()}


def table(budgets: dict[str, Figures]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| target, kernel, dtype, width | tiles | registers | spilled bytes | shared memory | instructions |"
    yield "|---|---|---|---|---|---|"
    for case in all_cases():
        if str(case) in budgets:
            x = budgets[str(case)]
            shape = _tile(case)
            counts = ", ".join(f"{name} {count}" for name, count in x.instructions.items())
            yield f"| {case} | {shape} | {x.registers} | {x.spills} | {x.shared:,} | {counts} |"


def _tile(case: Case) -> str:
    """The tile that a kernel works on, as text."""
    if case.kernel in ("merge", "experts_combine"):
        return ""
    if case.kernel in EXPERT_KERNELS:
        config = expert_tiles(case.target, case.element_bytes)
        return f"{config.block_m} x {config.block_n}"
    config = tiles(case.target, case.kernel, case.element_bytes, case.width)
    return f"{config.block_q} x {config.block_k}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--all", action="store_true", help="every case, not only those of the tests")
    parser.add_argument("--write", action="store_true", help="record lower budgets and new cases")
    parser.add_argument("--raise", dest="up", action="store_true", help="as --write, and let exceeded budgets rise")
    parser.add_argument("--table", action="store_true", help="print what is recorded and compile nothing")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, metavar="FILE")
    options = parser.parse_args(arguments)
    digest, budgets = recorded(options.budgets)
    if options.table:
        print("\n".join(table(budgets)))
        return 0
    broken = 0
    for case in all_cases() if options.all else test_cases():
        found, name = compiled(case), str(case)
        over = excesses(found, budgets.get(name, found), TARGETS[case.target].shared)
        print(f"{name}: {found}" + (f"  EXCEEDS: {'; '.join(over)}" if over else ""), flush=True)
        broken += bool(over) and not options.up
        budgets[name] = found if over and options.up else lowered(found, budgets.get(name, found))
    if broken == 0 and (options.write or options.up):
        content = {
            "source": source() if options.all else digest,
            "cases": {str(case): asdict(budgets[str(case)]) for case in all_cases() if str(case) in budgets},
        }
        options.budgets.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
