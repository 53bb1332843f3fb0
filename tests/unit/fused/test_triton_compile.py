"""The Triton kernels compile for GPUs that are not here, within budgets that only fall."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fused import compile as ahead
from fused.compile import Case, Figures, all_cases, excesses, recorded, source
from fused.triton_config import EXPERT_KERNELS, TARGETS, tiles

ROOT = Path(__file__).resolve().parents[3]
# What a 16-bit kernel of each target computes with, and how its forward moves data.
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
COPIES = {"sm_80": "LDGSTS", "sm_90": "UTMALDG", "sm_100": "UTMALDG"}
FOUND = Figures(200, 0, 1000, {"HMMA": 8, "LDGSTS": 4})


@pytest.mark.timeout(600)
def test_kernels_compile_within_their_budgets() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fused.compile"], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_record_is_of_this_source_and_has_every_case() -> None:
    digest, budgets = recorded()
    assert digest == source(), "run python -m fused.compile --all --write"
    assert set(budgets) == set(map(str, all_cases()))


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_a_recorded_case_spills_nothing_and_uses_its_target(case: Case) -> None:
    figures = recorded()[1][str(case)]
    assert figures.shared <= TARGETS[case.target].shared
    if case.element_bytes == 4:  # exact fp32 products, for checking: held to their budgets, spills and all
        return
    assert figures.spills == 0 or (case.dropout and case.kernel == "backward" and figures.spills < 100)
    if case.kernel in ("merge", "experts_combine"):
        return
    wide = case.width == 256  # for which wgmma's operands leave too few registers to a backward
    assert any(figures.instructions.get(x) for x in (PRODUCTS[case.target], *(["HMMA"] if wide else [])))
    if case.kernel in EXPERT_KERNELS:
        assert case.target == "gfx942" or figures.instructions.get("LDGSTS")
        return
    if case.kernel == "forward" and case.target in COPIES:
        assert figures.instructions.get(COPIES[case.target])
    if tiles(case.target, case.kernel, 2, case.width).descriptors and case.kernel == "backward":
        assert figures.instructions.get("UTMAREDG")


def test_an_exceeded_budget_and_a_lost_instruction_are_named() -> None:
    assert excesses(FOUND, FOUND, 1000) == []
    assert excesses(replace(FOUND, instructions={"HMMA": 1, "LDGSTS": 1}), FOUND, 1000) == []
    assert excesses(replace(FOUND, registers=201), FOUND, 1000) == ["registers 201 > 200"]
    assert excesses(replace(FOUND, spills=4), FOUND, 1000) == ["spills 4 > 0"]
    assert excesses(FOUND, FOUND, 999) == ["shared 1000 > 999"]
    assert excesses(replace(FOUND, instructions={"HMMA": 8}), FOUND, 1000) == ["LDGSTS is gone"]


def test_budgets_fall_and_rise_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "budgets.json"
    case = Case("sm_80", "forward", 2, 128)
    monkeypatch.setattr(ahead, "test_cases", lambda: [case])

    def run(figures: Figures, *flags: str) -> tuple[int, dict[str, int]]:
        monkeypatch.setattr(ahead, "compiled", lambda _: figures)
        code = ahead.main([*flags, "--budgets", str(file)])
        return code, json.loads(file.read_text())["cases"][str(case)]

    assert run(FOUND, "--write") == (0, asdict(FOUND))
    less, more = replace(FOUND, registers=150), replace(FOUND, registers=210)
    assert run(more, "--write") == (1, asdict(FOUND))
    assert run(less) == (0, asdict(FOUND))
    assert run(less, "--write") == (0, asdict(less))
    assert run(FOUND) == (1, asdict(less))
    assert run(more, "--raise") == (0, asdict(more))


def test_the_documented_table_is_the_recorded_one() -> None:
    lines = list(ahead.table(recorded()[1]))
    assert len(lines) == 2 + len(all_cases())
    assert "\n".join(lines) in (ROOT / "docs/kernels.md").read_text()
