"""The layout: packages are plain and typed, shadow nothing installed, and what must stay light stays light."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cluster", "conf", "data", "fused", "inference", "launch", "models", "parallel", "trainers")
HEAVY = ("torch", "ray", "transformers", "triton", "wandb")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed_and_says_what_it_is(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert (ROOT / package / "__init__.py").read_text().startswith('"""')


def test_no_package_shadows_an_installed_distribution() -> None:
    installed = importlib.metadata.packages_distributions()
    for package in (*PACKAGES, "tests", "benchmarks"):
        owners = {owner.lower() for owner in installed.get(package, [])} - {"sundog"}
        assert not owners, f"{package}/ hides the installed {owners}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan"], ["train", "trainer.stepz=1"]])
def test_help_plan_and_config_errors_load_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from launch.__main__ import main; main(sys.argv[1:]);"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
