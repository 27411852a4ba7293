"""Files of a run: written atomically, read with one sentence for what is wrong with them."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segkit.errors import InputError, first_line

MOST_BYTES = 2**20
"""Size of a saved configuration beyond which it is not read."""
MOST_JSON_BYTES = 2**26
"""Size of a JSON file beyond which it is not read; a run writes a few thousand times less."""

MOST_DEPTH, MOST_VALUES = 50, 10_000
"""Lists and mappings in each other, and keys and values in all, in a YAML file beyond which it is not read."""

PARTS = ("dataset", "model", "loss", "optimizer", "schedule")
"""What every configuration of a run has."""

LOCK, HOLDER = ".running.lock", "running.json"
"""Files of a folder that one process works in: what the operating system locks, and which process that is."""

FOREIGN = "copy the config.yaml that segkit wrote, or train again"
"""What mends a saved configuration that cannot be read."""


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; without an exception that file then becomes ``path``.

    A reader sees the old file or the new one, never a part, also one that lists the files with the suffix of ``path``.
    Two processes or threads may write the same file at once: one of the two contents stays.
    """
    thread = threading.get_native_id()  # no other thread of any process has it
    temporary = path.with_name(f"{path.name[:50]}.{thread}.tmp")  # not too long where that of path is not
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # None: of a disk that fails while it is written to
            error.filename = str(path)
        raise
    finally:
        remove_if_possible(temporary)


def check_place(folder: Path) -> None:
    """Raise InputError if ``folder``, the output of a verb, cannot be made, or not be written."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise InputError(f"--output is {folder}, but {place} is no folder: give another one")
    if not os.access(place, os.W_OK):
        raise InputError(f"--output is {folder}, but the folder {place} cannot be written: give another one")


def remove_if_possible(path: Path) -> None:
    """Remove the file ``path`` if it is there; an error, as of a disk that fails, does not hide the one before it."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` as :func:`written_beside` does, and flush it to the disk."""
    # "x": in a stranger's folder the name may be a link to another file
    with written_beside(path) as temporary, open(temporary, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN becomes null, so that any JSON reader takes the file."""
    write_atomically(path, json.dumps(without_nan(value), indent=2) + "\n")


def digest_of(path: Path) -> str:
    """SHA-256 of the file ``path``, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_nan(value: Any) -> Any:
    """``value`` with None in place of every NaN or infinity."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def read_json(
    path: Path,
    *,
    cure: str = "the run folder is damaged; copy it again, or train again",
    most: int = MOST_JSON_BYTES,
) -> dict[str, Any]:
    """The JSON object in ``path``; InputError, which ends with ``cure``, if it is missing, torn, or of another type.

    So is a file of more than ``most`` bytes.
    """
    try:
        content = json.loads(read_text(path, most=most, cure=cure))
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there: the run has not got so far; the command that trains it goes on"
        ) from None
    except RecursionError:
        raise InputError(f"{path} cannot be read (it is nested too deeply): {cure}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({error}): {cure}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: {cure}")
    return content


def read_text(path: Path, *, most: int, cure: str) -> str:
    """The text (UTF-8) in ``path``; FileNotFoundError if it is missing.

    InputError, which ends with ``cure``, for a folder or a device in its place, for more than ``most`` bytes, and for
    bytes that are no text.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            kind = "a folder" if path.is_dir() else "no regular file"
            raise InputError(f"{path} is {kind}, but must be a file: {cure}")
        if (size := path.stat().st_size) > most:
            raise InputError(f"{path} has {size} bytes, but at most {most} are read: {cure}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): {cure}") from None


@functools.lru_cache(maxsize=8)  # evaluating, predicting and resuming read a configuration several times
def more_than_plain(text: str) -> str | None:
    """What the YAML ``text`` has that is more than plain values, with its line; None if nothing.

    References, of which a few lines can stand for terabytes, tags, ``${...}``, and nesting deeper than
    :data:`MOST_DEPTH` or more than :data:`MOST_VALUES`, which keep parsers busy for minutes. Raises yaml.YAMLError for
    text that is no YAML.
    """
    import yaml

    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            return f"is nested more than {MOST_DEPTH} deep in line {line}"
        if number > MOST_VALUES:
            return f"holds more than {MOST_VALUES} keys and values by line {line}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            return f"uses references or tags of YAML in line {line}"
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            return f"has '${{' in line {line}"
    return None


def read_config_text(path: Path, *, cure: str = FOREIGN) -> dict[str, Any]:
    """The mapping in the saved configuration ``path`` (YAML or JSON), as plain values that nothing has resolved.

    A stranger may have written it: InputError, which ends with ``cure``, for a file of more than :data:`MOST_BYTES`,
    for what is :func:`more_than_plain` (with ``${...}`` OmegaConf would read the environment), and for one that lacks
    one of :data:`PARTS`.
    """
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = read_text(path, most=MOST_BYTES, cure=cure)
        if reason := more_than_plain(text):
            raise InputError(f"{path} {reason}, but a saved configuration has plain values only: {cure}")
        content = copy.deepcopy(_mapping(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({first_line(error)}): {cure}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds no configuration: {cure}")
    if missing := [key for key in PARTS if key not in content]:
        raise InputError(f"{path} has no {missing[0]}, as if it were cut off: {cure}")
    return {str(key): value for key, value in content.items()}


@functools.lru_cache(maxsize=8)
def _mapping(text: str) -> Any:
    """The mapping in the YAML ``text``, None if it holds something else; callers take a copy."""
    import yaml
    from omegaconf import OmegaConf

    first = next(itertools.islice(yaml.parse(text, Loader=yaml.SafeLoader), 2, None), None)  # of the document
    is_mapping = isinstance(first, yaml.MappingStartEvent)  # OmegaConf fails on a number
    return OmegaConf.to_container(OmegaConf.create(text)) if is_mapping else None


def remove_if_empty(path: Path, *, lock: str = "") -> None:
    """Remove a folder with nothing, or nothing but ``lock``, in it, and what Hydra made above it, up to outputs/."""
    outputs = Path("outputs").resolve()
    with contextlib.suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [lock]:
            (path / lock).unlink()
        path.rmdir()
        for parent in path.resolve().parents:
            if outputs not in (parent, *parent.parents):
                break
            parent.rmdir()


@contextlib.contextmanager
def held(folder: Path, *, doing: str, key: str) -> Iterator[None]:
    """Make ``folder`` and keep other processes out of it; InputError, with host and process, if one is in it.

    ``doing``: what such a process does, as in "trains in"; ``key``: the setting that names the folder. The operating
    system takes the lock back from a process that died. A folder that is left empty is removed.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / LOCK))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{_holder(folder)} {doing} {folder}: wait for it, or set another {key}") from None
    except OSError as error:  # as of a network's disk that knows no locks
        remove_if_empty(folder, lock=LOCK)
        raise InputError(
            f"{key} is {folder}, which cannot be made, or in which no file can be locked ({error.strerror}): set "
            f"another {key}"
        ) from None
    try:
        write_json(folder / HOLDER, {"host": socket.gethostname(), "pid": os.getpid()})
        yield
    finally:
        remove_if_possible(folder / HOLDER)
        lock.release()  # its file stays: to remove it would let two processes hold two files of one name
        remove_if_empty(folder, lock=LOCK)


def _holder(folder: Path) -> str:
    """The process that holds ``folder``, in words."""
    try:
        holder = read_json(folder / HOLDER)
        return f"process {holder['pid']} on {holder['host']}"
    except (InputError, KeyError):
        return "another process"
