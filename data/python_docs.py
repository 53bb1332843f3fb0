"""The documentation and sources of the Python that runs this: real text on every machine, a few thousand documents.

Three kinds: the language reference's topics as ``help()`` shows them, the docstrings of public modules, classes and
functions under their signature, and module sources; test suites and generated tables stay out.
"""

import ast
import importlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.documents import Document, Skip

LICENCE = "PSF-2.0"
MIN_DOCSTRING = 100  # characters
DOCUMENTS_PER_MODULE = 8  # about, for the size of a slice
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "pydoc_data", "__phello__"}
LEFT_OUT |= {"encodings"}  # nearly all of it is code tables
Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def slices(shard_documents: int) -> list[dict[str, Any]]:
    """Units of reading: the topics, then groups of module files that give about ``shard_documents`` documents each."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    size = max(1, shard_documents // DOCUMENTS_PER_MODULE)
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    return [{"kind": "topics"}, *({"kind": "modules", "root": str(root), "names": group} for group in groups)]


def inputs(units: list[dict[str, Any]]) -> list[Any]:
    """What identifies the corpus: the version, the files' names and sizes."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for unit in units for name in unit.get("names", [])]
    return [["python", platform.python_version()], *([name, (root / name).stat().st_size] for name in names)]


def read(unit: dict[str, Any]) -> Iterator[Document | Skip]:
    """Documents of one slice."""
    if unit["kind"] == "topics":
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:  # some distributions leave it out
            yield Skip("python/topics", "python_docs/topics", "unreadable_file", str(error))
            return
        for name, text in sorted(topics.items()):
            yield Document(id=f"python/topic/{name}", text=text.strip() + "\n", source="python_docs/topics")
        return
    for name in unit["names"]:
        try:
            source = (Path(unit["root"]) / name).read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError) as error:
            yield Skip(name, "python_docs/sources", "unreadable_file", str(error)[:200])
            continue
        yield Document(id=f"python/source/{name}", text=source, source="python_docs/sources")
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield from docstrings(tree, module)


def docstrings(node: Node, name: str) -> Iterator[Document]:
    """Docstrings of a module or class and of its public members, outermost first."""
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_DOCSTRING:
        yield Document(
            id=f"python/doc/{name}", text=f"{signature(node, name)}\n\n{text}\n", source="python_docs/docstrings"
        )
    if isinstance(node, ast.Module | ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and member.name[0] != "_":
                yield from docstrings(member, f"{name}.{member.name}")


def signature(node: Node, name: str) -> str:
    """The first line of a docstring's document."""
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {name}({ast.unparse(node.args)}){returns}"
