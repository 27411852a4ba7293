"""``_target_`` nodes: from a name and arguments in a configuration to the object they describe.

A saved run's configuration is untrusted input, so only names below a few prefixes are imported.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from segkit.errors import InputError

ALLOWED_TARGETS = ("segkit.", "torch.optim.", "segmentation_models_pytorch.")
"""Prefixes that ``_target_`` may have: a saved run's configuration is untrusted input."""

LOSS_OPTIONS = ("banded", "diagnostics")
"""Keys of a loss node that the pipeline reads; they are not arguments of the loss."""


def check_allowed(node: dict[str, Any], *, key: str) -> None:
    """Raise InputError if ``node`` or a node below it names a target outside :data:`ALLOWED_TARGETS`."""
    target = node.get("_target_")
    allowed = isinstance(target, str) and target.startswith(ALLOWED_TARGETS)
    if not allowed or ".." in str(target) or "__" in str(target):
        raise InputError(
            f"{key}._target_ is {target!r}, but must begin with one of {', '.join(ALLOWED_TARGETS)}: "
            f"choose an option of the group {key.split('.')[0]}"
        )
    for name, child in children(node):
        check_allowed(child, key=f"{key}.{name}")


def children(node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The nested target nodes of ``node``: values, and values one mapping deeper, that have a ``_target_``."""
    found = []
    for name, value in node.items():
        if isinstance(value, dict):
            if "_target_" in value:
                found.append((name, value))
            else:
                found += [(f"{name}.{inner}", child) for inner, child in children(value)]
    return found


def locate(target: str, *, key: str = "_target_") -> Any:
    """Import the object that ``target`` names; InputError if there is none."""
    check_allowed({"_target_": target}, key=key)
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{key} names {target!r}, which cannot be imported ({error}): correct the name") from None


def bind(node: dict[str, Any], facts: dict[str, Any], *, key: str) -> tuple[Any, dict[str, Any]]:
    """The target of ``node`` and the keyword arguments for it: the node's own, and the facts that it asks for.

    A fact is passed where the target has a parameter of its name that the node leaves out or sets to null.
    InputError names an argument that the target does not have, or one that is missing.
    """
    function = locate(node["_target_"], key=f"{key}._target_")
    arguments = {name: value for name, value in node.items() if name not in ("_target_", *LOSS_OPTIONS)}
    parameters = inspect.signature(function).parameters
    for name, value in facts.items():
        if name in parameters and arguments.get(name) is None:
            arguments[name] = value
    accepts_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    unknown = [] if accepts_any else [name for name in arguments if name not in parameters]
    if unknown:
        allowed = ", ".join(name for name in parameters if name not in facts)
        raise InputError(
            f"{key}.{unknown[0]} is not an argument of {node['_target_']}, which takes {allowed}: "
            f"remove {key}.{unknown[0]} or correct its name"
        )
    missing = [
        name
        for name, item in parameters.items()
        if item.default is inspect.Parameter.empty
        and item.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        raise InputError(f"{key}.{missing[0]} is needed by {node['_target_']}: set {key}.{missing[0]}=...")
    return function, arguments


def instantiate(node: dict[str, Any], facts: dict[str, Any] | None = None, *, key: str) -> Any:
    """Build the object that ``node`` describes; nested target nodes first, in the same way."""
    facts = facts or {}

    def build(value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            return value
        if "_target_" in value:
            return instantiate(value, facts, key=name)
        return {inner: build(item, f"{name}.{inner}") for inner, item in value.items()}

    built = {name: value if name == "_target_" else build(value, f"{key}.{name}") for name, value in node.items()}
    function, arguments = bind(built, facts, key=key)
    return function(**arguments)
