"""What readers share: folders that must exist, list files, and pairing images with labels by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from segkit.data.labels import TABLES
from segkit.errors import InputError

_refused: ContextVar[list[InputError] | None] = ContextVar("refused", default=None)


@contextmanager
def collecting() -> Iterator[list[InputError]]:
    """While this context is open, readers leave out pairs that they would refuse; yields the errors so far.

    Training stops at the first such pair; an audit wants all of them, and what is wrong beside them.
    """
    errors: list[InputError] = []
    token = _refused.set(errors)
    try:
        yield errors
    finally:
        _refused.reset(token)


def refuse(error: InputError) -> None:
    """Raise ``error``, or keep it for :func:`collecting`; the caller then goes on without the pair."""
    errors = _refused.get()
    if errors is None:
        raise error
    errors.append(error)


def require_root(root: Path | str | None, *, dataset: str) -> Path:
    """``root`` as a Path; InputError where the data set needs one and none was given."""
    if root is None:
        raise InputError(f"data set {dataset} needs its folder; set dataset.root=FOLDER")
    return Path(root)


def require_folder(folder: Path, *, dataset: str, root: Path, archives: str) -> Path:
    """``folder`` if it is one; else InputError naming it, the archives to unpack there and dataset.root.

    Where the wanted tree lies one level above or below ``root`` the sentence says which root would be right.
    """
    try:
        if folder.is_dir():
            next(folder.iterdir(), None)
            return folder
    except PermissionError:
        raise InputError(
            f"folder {folder} of {dataset} may not be read by this user; run `chmod -R u+rX {root}`"
        ) from None
    raise InputError(
        f"{dataset} is not complete under {root}: folder {folder} does not exist; unpack {archives} into one "
        f"folder and set dataset.root to it{_nearby(folder, root)}"
    )


def _nearby(folder: Path, root: Path) -> str:
    try:
        wanted = folder.relative_to(root)
        candidates = [root.parent, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    except (ValueError, OSError):
        return ""
    for candidate in candidates:
        if (candidate / wanted).is_dir():
            return f" (it looks like dataset.root={candidate})"
    return ""


def read_list(path: Path, *, dataset: str, archives: str) -> list[str]:
    """The non-empty lines of a list file, stripped; InputError where it is missing, unreadable or empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(
            f"{dataset} lacks its list file {path}; unpack {archives} into one folder and name it in dataset.root"
        ) from None
    except PermissionError:
        raise InputError(f"list file {path} may not be read by this user; run `chmod u+r {path}`") from None
    except UnicodeDecodeError:
        raise InputError(f"list file {path} is not a text file; unpack {archives} again") from None
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"list file {path} has no entries, so the split is empty; unpack {archives} again")
    return lines


def inside(root: Path, relative: str, *, list_file: Path) -> Path:
    """``root / relative``; InputError where the entry of ``list_file`` would leave ``root``.

    Judged by the text alone (no link is followed), so that a data set of symbolic links still works.
    """
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"entry {relative!r} of {list_file} leaves the data set's folder {root}; entries must be names "
            "or paths below dataset.root without '..'"
        )
    return root / path


def files_by_id(folder: Path, *, suffix: str) -> dict[str, Path]:
    """{file name without ``suffix``: path} of the visible files of ``folder`` that end with it, sorted."""
    files = sorted(p for p in folder.iterdir() if p.name.endswith(suffix) and not p.name.startswith("."))
    return {p.name[: len(p.name) - len(suffix)]: p for p in files}


def pair(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    *,
    dataset: str,
    expected_image: str,
    expected_label: str,
) -> list[tuple[str, Path, Path]]:
    """(id, image, label) of every id, in the order of ``images``; InputError for an id with only one.

    ``expected_image`` and ``expected_label`` are patterns with ``{id}`` shown as the missing file.
    """
    lonely = [key for key in images if key not in labels]
    if lonely:
        refuse(
            InputError(
                f"image {images[lonely[0]]} of {dataset} has no label ({expected_label.format(id=lonely[0])} is "
                f"missing){_others(set(lonely))}; unpack the labels again or remove the image"
            )
        )
    lonely = [key for key in labels if key not in images]
    if lonely:
        refuse(
            InputError(
                f"label {labels[lonely[0]]} of {dataset} has no image ({expected_image.format(id=lonely[0])} is "
                f"missing){_others(set(lonely))}; unpack the images again or remove the label"
            )
        )
    return [(key, image, labels[key]) for key, image in images.items() if key in labels]


def _others(missing: set[str]) -> str:
    return f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""


def check_split(split: str, allowed: Iterable[str], *, dataset: str) -> None:
    """InputError unless ``split`` is one of ``allowed``."""
    allowed = list(allowed)
    if split not in allowed:
        raise InputError(
            f"{dataset} has no split {split!r}; allowed are {', '.join(allowed)} "
            "(dataset.train_split, dataset.val_split)"
        )


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
