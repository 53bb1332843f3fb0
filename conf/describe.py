"""The schema as text: every key with its type, default and the comment beside it, for ``--help`` and error messages."""

import ast
import inspect
from dataclasses import dataclass, fields, is_dataclass
from functools import cache

from conf import curate, schema
from conf.schema import CHOICES, RunConfig


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    name: str
    kind: type
    default: object
    comment: str


def _comments() -> dict[tuple[str, str], str]:
    """Map (class, field) to the trailing comment of the field's line."""
    found = {}
    for module in (curate, schema):
        source = inspect.getsource(module)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        _, mark, comment = lines[item.lineno - 1].partition("  # ")
                        found[node.name, item.target.id] = comment if mark else ""
    return found


@cache
def keys() -> dict[str, Key]:
    """Return every leaf key of the schema by its dotted name, in schema order. Made once: it parses the schema."""
    comments = _comments()
    found: dict[str, Key] = {}

    def walk(node: object, prefix: str) -> None:
        for item in fields(node):  # pyright: ignore[reportArgumentType]
            value = getattr(node, item.name)
            name = prefix + item.name
            if is_dataclass(value):
                walk(value, name + ".")
                continue
            comment = comments[type(node).__name__, item.name]
            if name in CHOICES:
                comment = " | ".join(CHOICES[name]) + (f"; {comment}" if comment else "")
            found[name] = Key(name, type(value), value, comment)

    walk(RunConfig(), "")
    return found
