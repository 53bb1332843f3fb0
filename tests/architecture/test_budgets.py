"""The size budgets: a file has one reason to change and stays short, and so does a function."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES = 400
FUNCTION_LINES = 80
# path -> (lines allowed, why). Raising the budget of one file takes a sentence here.
LARGER_FILES: dict[str, tuple[int, str]] = {}


def python_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listing.stdout.split() if (ROOT / name).exists()]


def long_functions(source: str) -> list[tuple[str, int]]:
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions]
    return [(name, length) for name, length in lengths if length > FUNCTION_LINES]


@pytest.mark.parametrize("name", python_files())
def test_file_and_its_functions_are_within_budget(name: str) -> None:
    source = (ROOT / name).read_text()
    allowed, _ = LARGER_FILES.get(name, (FILE_LINES, ""))
    assert len(source.splitlines()) <= allowed
    assert long_functions(source) == []


def test_budget_finds_a_long_function() -> None:
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}") == [("f", FUNCTION_LINES + 1)]
