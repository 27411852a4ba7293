"""Signatures of functions and classes, read from their source.

To import torch takes seconds, which is long for the answer that an argument is misspelt.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import functools
import importlib.util
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Signature(NamedTuple):
    """``parameters`` without self, and the types of those that have one."""

    parameters: Mapping[str, inspect.Parameter]
    hints: dict[str, Any]


class _Names(dict[str, Any]):
    """What a name in an annotation stands for; a class of the same name, without a meaning, for one not known."""

    def __missing__(self, name: str) -> Any:
        for module in (builtins, collections.abc, typing):
            if hasattr(module, name):
                return getattr(module, name)
        return type(name, (), {})


@functools.cache
def read_signature(module: str, name: str) -> Signature | None:
    """The signature of what ``module`` defines as ``name``; None if its source is not there, or does not say it."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)  # of the package alone, which imports nothing
    folder = Path(((spec and spec.submodule_search_locations) or ["."])[0])
    paths = (folder.joinpath(*rest).with_suffix(".py"), folder.joinpath(*rest, "__init__.py"))
    path = next((path for path in paths if rest and path.is_file()), None)
    if path is None:
        return None
    defined = {getattr(node, "name", ""): node for node in ast.parse(path.read_text(encoding="utf-8")).body}
    found = defined.pop(name, None)
    while isinstance(found, ast.ClassDef):
        made = next((node for node in found.body if getattr(node, "name", "") == "__init__"), None)
        if made is not None:
            return _read(made, skip=1)
        found = defined.pop(ast.unparse(found.bases[0]), None) if found.bases else None
        if not isinstance(found, ast.ClassDef):
            return None
    return _read(found, skip=0)


def _read(node: Any, *, skip: int) -> Signature | None:
    """The signature of the function ``node`` without the first ``skip`` parameters; None for another node.

    Python reads it, from a function of the same arguments without a body; a default that is no constant is ``...``.
    """
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return None
    given: Any = node.args
    for defaults in (given.defaults, given.kw_defaults):
        defaults[:] = [value if _is_constant(value) else ast.Constant(...) for value in defaults]
    stub: dict[str, Any] = {}
    exec(f"def read({ast.unparse(given)}): ...", {"__builtins__": {}}, stub)  # annotations stay text, as here
    parameters = dict(list(inspect.signature(stub["read"]).parameters.items())[skip:])
    hints = {name: _type_of(item.annotation) for name, item in parameters.items() if item.annotation is not item.empty}
    return Signature(parameters, hints)


def _is_constant(value: ast.expr | None) -> bool:
    try:
        value is None or ast.literal_eval(value)
    except ValueError:
        return False
    return True


def _type_of(annotation: str) -> Any:
    """The type that an annotation of an installed package stands for; Any if that takes more than its text."""
    try:
        return eval(annotation.strip("'\""), {"__builtins__": {}}, _Names(Path=Path))
    except Exception:  # an attribute of a class that stands for an unknown one
        return Any
