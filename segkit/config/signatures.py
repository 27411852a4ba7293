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

KINDS = inspect.Parameter


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
    """The signature of the function ``node`` without the first ``skip`` parameters; None for another node."""
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return None
    given = node.args
    places = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(places) - len(given.defaults))
    rows: list[tuple[ast.arg, ast.expr | None, Any]] = [
        (item, value, KINDS.POSITIONAL_ONLY if item in given.posonlyargs else KINDS.POSITIONAL_OR_KEYWORD)
        for item, value in zip(places, [*missing, *given.defaults], strict=True)
    ]
    rows += [(given.vararg, None, KINDS.VAR_POSITIONAL)] if given.vararg else []
    rows += [(item, value, KINDS.KEYWORD_ONLY) for item, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    rows += [(given.kwarg, None, KINDS.VAR_KEYWORD)] if given.kwarg else []
    parameters, hints = {}, {}
    for item, value, kind in rows[skip:]:
        default = KINDS.empty if value is None else _constant(value)
        parameters[item.arg] = inspect.Parameter(item.arg, kind, default=default)
        if item.annotation is not None:
            hints[item.arg] = _type_of(item.annotation)
    return Signature(parameters, hints)


def _constant(value: ast.expr) -> Any:
    """The value that ``value`` stands for, or the node itself if it is no constant."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return value


def _type_of(annotation: ast.expr) -> Any:
    """The type that an annotation of an installed package stands for; Any if that takes more than its text."""
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    try:
        return eval(str(text), {"__builtins__": {}}, _Names(Path=Path))
    except Exception:  # an attribute of a class that stands for an unknown one
        return Any
