"""The schema as text: every key with its type, default and the comment beside it, for ``--help`` and error messages."""

import ast
import inspect
from dataclasses import dataclass, fields, is_dataclass
from functools import cache

from conf.schema import CHOICES, RunConfig


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    name: str
    kind: type
    default: object
    comment: str


@cache
def _comments(kind: type) -> dict[str, str]:
    """Map each field of a dataclass of the schema to the trailing comment of its line."""
    source = inspect.getsource(kind)
    lines, (definition,) = source.splitlines(), ast.parse(source).body
    assert isinstance(definition, ast.ClassDef), "the schema is made of dataclasses"
    found = {}
    for item in definition.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            _, mark, comment = lines[item.lineno - 1].partition("  # ")
            found[item.target.id] = comment if mark else ""
    return found


@cache
def keys() -> dict[str, Key]:
    """Return every leaf key of the schema by its dotted name, in schema order. Made once: it parses the schema."""
    found: dict[str, Key] = {}

    def walk(node: object, prefix: str) -> None:
        for item in fields(node):  # pyright: ignore[reportArgumentType]
            value = getattr(node, item.name)
            name = prefix + item.name
            if is_dataclass(value):
                walk(value, name + ".")
                continue
            comment = _comments(type(node))[item.name]
            if name in CHOICES:
                comment = " | ".join(CHOICES[name]) + (f"; {comment}" if comment else "")
            found[name] = Key(name, type(value), value, comment)

    walk(RunConfig(), "")
    return found
