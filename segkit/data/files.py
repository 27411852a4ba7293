"""Find and read the files of a user: which files of a folder are images, what a file holds, what a text says.

Whatever is no regular file (a pipe, a device, a socket) is refused by a look at its entry and never opened, since
opening it may wait for ever.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from segkit.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Ends of the names of image files, in lower case."""

_KINDS = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}


def check_readable(path: Path, *, role: str, may_be_empty: bool = False) -> None:
    """Raise the InputErrors of :func:`open_file`, without reading the file."""
    open_file(path, role=role, may_be_empty=may_be_empty).close()


def open_file(path: Path, *, role: str, may_be_empty: bool = False) -> BinaryIO:
    """Open a file for reading; InputError for one that is missing, empty, not regular or may not be read.

    ``role`` names the file in the sentence ("image", "label").
    """
    try:
        state = path.stat()
        file = path.open("rb") if stat.S_ISREG(state.st_mode) else None
    except OSError as error:
        raise _unreadable(path, error, role) from None
    if stat.S_ISDIR(state.st_mode):
        raise InputError(f"{role} {path} is a folder, but a file is wanted; mend dataset.root")
    if file is None:
        kind = _KINDS.get(stat.S_IFMT(state.st_mode), "a device")
        raise InputError(f"{role} {path} is {kind}, but a regular file is wanted; remove it")
    if state.st_size == 0 and not may_be_empty:
        file.close()
        raise InputError(f"{role} {path} is empty (0 bytes); copy or unpack it again")
    return file


def read_bytes(path: Path, *, role: str, may_be_empty: bool = False) -> bytes:
    """Return the content of a file; raises the InputErrors of :func:`open_file`."""
    with open_file(path, role=role, may_be_empty=may_be_empty) as file:
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(path, error, role) from None


def read_text(path: Path, *, role: str, missing: str) -> str:
    """Return the text of a UTF-8 file without its byte order mark, with "\\n" at the end of lines.

    ``missing`` is the sentence for a file that does not exist. Raises InputError for that, for a file that may not be
    read, and for bytes that are no UTF-8.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: of a NUL byte
        raise InputError(missing) from None
    except OSError as error:
        raise _unreadable(path, error, role) from None
    content = read_bytes(path, role=role, may_be_empty=True)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "perhaps Latin-1"
        raise InputError(
            f"{role} {path} is no text in UTF-8 (byte 0x{content[error.start]:02x} at position {error.start}; {kind}): "
            "save it as UTF-8, or unpack it again"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unreadable(path: Path, error: OSError, role: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{role} {path} does not exist; unpack the archive again or mend dataset.root")
    if isinstance(error, PermissionError):
        folder = path if role == "folder" else path.parent
        return InputError(f"{role} {path} may not be read by this user; run `chmod -R u+rX {folder}`")
    return InputError(f"{role} {path} cannot be read: {error.strerror}; check the disk")


def walk(folder: Path, suffixes: Collection[str] | None = None) -> list[Path]:
    """Return the files of ``folder`` and its subfolders whose names end with one of ``suffixes``, sorted.

    Upper and lower case of the end of a name do not matter; without ``suffixes`` all files count. Hidden files and
    folders (their names begin with a dot) are left out. Links to folders are followed, but no folder is visited twice,
    so that a link that leads back neither loops nor repeats files. Entries that are no regular files are among the
    results; reading them gives the sentence. Raises InputError for a folder that may not be read, and for a name that
    is no UTF-8.
    """
    seen = {_identity(parent) for parent in folder.resolve().parents}
    found: list[Path] = []
    folders, links = [folder], list[Path]()
    while folders or links:  # links last: what can be reached without one keeps its own path
        current = folders.pop() if folders else links.pop(0)
        if (identity := _identity(current)) in seen:
            continue
        seen.add(identity)
        for entry in visible_entries(current):
            path = Path(entry.path)
            if is_folder(entry):
                (links if entry.is_symlink() else folders).append(path)
            elif suffixes is None or path.suffix.lower() in suffixes:
                found.append(path)
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of ``folder`` that are not hidden, by name; raises InputError as :func:`walk` does."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error, "folder") from None
    shown.sort(key=lambda entry: entry.name)
    for entry in shown:
        if (name := os.fsencode(entry.name).decode("utf-8", "backslashreplace")) != entry.name:
            raise InputError(f"the name of {name} in folder {folder} is no UTF-8, so it cannot be written; rename it")
    return shown


def is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder and a link to one; False also for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def without_suffix(relative: str) -> str:
    """Return the path of an image below its folder without its extension, with forward slashes."""
    path = Path(relative)
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()


def find_images(source: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Find the image files of a folder (see :func:`walk`), of a pattern such as ``'shots/*.jpg'``, or a single file.

    The keys are names for the results, without suffix unless two files would share it; folders are kept. Files below
    ``output`` are left out, so that a second run does not predict the results of the first. Raises InputError if there
    is no image.
    """
    source = Path(source)
    if source.is_dir():
        root, files = source, walk(source, IMAGE_SUFFIXES)
    elif source.exists():
        root, files = source.parent, [source]
    else:
        files = _matching(source)
        root = Path(os.path.commonpath([path.parent for path in files])) if files else source
    if output is not None:
        results = Path(output).resolve()
        others = [path for path in files if results not in Path(os.path.realpath(path)).parents]
        if files and not others:
            raise InputError(f"all images of {source} lie below {output}, where the results go: give another folder")
        files = others
    if not files:
        listed = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InputError(
            f"no image matches {source}; give a file, a pattern in quotes, or a folder with {listed} files "
            "(hidden ones do not count)"
        )
    names = [path.relative_to(root) for path in files]
    shared = Counter([*names, *(name.with_suffix("") for name in names)])
    return {
        (name if shared[name.with_suffix("")] > 1 else name.with_suffix("")).as_posix(): path
        for name, path in zip(names, files, strict=True)
    }


def _matching(pattern: Path) -> list[Path]:
    """Files that match a pattern, sorted; ``**`` goes the way of :func:`walk`."""
    place = next((at for at in range(len(pattern.parts)) if not Path(*pattern.parts[: at + 1]).is_dir()), 0)
    roots, wanted = Path(*pattern.parts[:place]), pattern.parts[place:]  # a folder may have brackets in its name
    if not set(wanted[0]) & set("*?["):
        return []
    if "**" not in wanted:
        matching = glob.glob(os.path.join(glob.escape(str(roots)), *wanted))
        return sorted(path for path in map(Path, matching) if not path.is_dir())
    return [path for path in walk(roots) if _matches(path.relative_to(roots).parts, wanted)]


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (bool(parts) and _matches(parts[1:], patterns))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
