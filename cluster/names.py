"""Functions by dotted name: how this package starts what it may not import."""

import importlib
from collections.abc import Callable
from typing import Any


def resolve(function: str) -> Callable[..., Any]:
    """Return the function behind a dotted name "package.module:function"."""
    module, colon, name = function.partition(":")
    assert colon, f"a function is named 'module:function', not {function!r}"
    found = getattr(importlib.import_module(module), name)
    assert callable(found), f"{function} is not callable"
    return found
