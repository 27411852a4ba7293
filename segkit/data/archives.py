"""Find an unpacked archive at the level at which a user named it, or say at which level it lies."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.data.labels import TABLES
from segkit.data.layout import require_folder
from segkit.errors import InputError


def table_file(name: str) -> dict[str, Any]:
    """The whole content of a shipped table file, with what stands in it beside the label table."""
    return json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))


def base_folder(root: Path, *, marker: str, tops: Sequence[str] = (), dataset: str, archives: str) -> Path:
    """The folder that holds the sub-folder ``marker``: ``root`` itself, or an archive's own top folder in it.

    ``tops`` are the relative paths of those top folders. InputError otherwise: where the tree lies one or two
    levels above ``root``, or one below, the sentence says so and gives the right ``dataset.root``.
    """
    for candidate in _levels(root, tops):
        if os.path.isdir(candidate / marker):
            return candidate
    root = root.absolute()
    for above in list(root.parents)[:2]:
        if any(os.path.isdir(candidate / marker) for candidate in _levels(above, tops)):
            raise InputError(
                f"dataset.root={root} is too deep for {dataset}, whose folder {marker} must lie in it; "
                f"set dataset.root={above}"
            )
    for below in _subfolders(root):
        if any(os.path.isdir(candidate / marker) for candidate in _levels(below, tops)):
            raise InputError(
                f"dataset.root={root} is one level too shallow for {dataset}, whose folder {marker} must lie "
                f"in it; set dataset.root={below}"
            )
    return require_folder(root / marker, dataset=dataset, root=root, archives=archives)


def _levels(folder: Path, tops: Sequence[str]) -> list[Path]:
    return [folder, *(folder / top for top in tops)]


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError:
        return []


def check_option(key: str, value: object, allowed: Sequence[object], *, dataset: str) -> None:
    """InputError unless the reader's option ``key`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join(str(item) for item in allowed)
        raise InputError(
            f"{dataset} has no {key} {value!r}; allowed are {listed}: set dataset.reader.{key}={allowed[0]}"
        )


def check_unique(entries: Sequence[str], *, file: Path) -> None:
    """InputError if an entry of the list ``file`` occurs twice."""
    seen: set[str] = set()
    for entry in entries:
        if entry in seen:
            raise InputError(f"list file {file} names {entry!r} twice; remove one of the two lines")
        seen.add(entry)


def missing_file(path: Path, *, list_file: Path, dataset: str, num_missing: int, archives: str) -> InputError:
    """The error for an entry of ``list_file`` whose file ``path`` is not there."""
    more = f" and {num_missing - 1} more like it" if num_missing > 1 else ""
    return InputError(
        f"{path}, which {list_file} of {dataset} names, does not exist{more}; unpack {archives} again, into one folder"
    )
