"""What readers share: folders that must exist, list files, and pairing images with labels by name."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from segkit.data.files import IMAGE_SUFFIXES, read_text, visible_entries
from segkit.data.samples import Sample
from segkit.errors import InputError

UNREAD = frozenset({".avif", ".dng", ".gif", ".heic", ".heif", ".jp2", ".tga"})
"""Ends of the names of images that no reader takes."""

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


def refuse(sentence: str) -> None:
    """Raise InputError, or keep it for :func:`collecting`; the caller then goes on without the pair."""
    errors = _refused.get()
    if errors is None:
        raise InputError(sentence)
    errors.append(InputError(sentence))


def check_split(split: str, allowed: Iterable[str], *, dataset: str) -> None:
    """Raise InputError unless ``split`` is one of ``allowed``."""
    allowed = list(allowed)
    if split not in allowed:
        raise InputError(
            f"{dataset} has no split {split!r}; allowed are {', '.join(allowed)} "
            "(dataset.train_split, dataset.val_split)"
        )


def check_option(key: str, value: object, allowed: Sequence[object], *, dataset: str) -> None:
    """Raise InputError unless the reader's option ``key`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join(str(item) for item in allowed)
        raise InputError(
            f"{dataset} has no {key} {value!r}; allowed are {listed}: set dataset.reader.{key}={allowed[0]}"
        )


def name_share(name: str, *, salt: str = "") -> float:
    """Return a number from 0 to 1 for a name, by a hash of it alone; uses of another ``salt`` are independent."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8, salt=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def group_of(name: str, pattern: str | None) -> str:
    """Return the part of ``name`` that ``pattern`` calls ``{group}``; the whole name where there is no pattern.

    ``*`` in the pattern stands for anything, ``{group}`` for the longest that fits: ``{group}_*`` makes video_0 of
    video_0_17. Raises InputError for another pattern, and for a name that does not fit.
    """
    if pattern is None:
        return name
    if pattern.count("{group}") != 1 or pattern.count("*") > 2:
        raise InputError(
            f"dataset.reader.groups is {pattern!r}, but must have {{group}} once, and * at most twice: set "
            "dataset.reader.groups='{group}_*' for names such as video_0_17"
        )
    found = re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\{group\}", "(.+)"), name)
    if found is None:
        raise InputError(f"image {name!r} does not fit dataset.reader.groups={pattern!r}: mend the pattern or the name")
    return found[1]


class Layout:
    """The folders and lists of one data set below ``root``; a sentence about what is missing names ``archives``.

    Raises InputError where ``root`` is None.
    """

    def __init__(self, dataset: str, root: Path | str | None, *, archives: str) -> None:
        if root is None:
            raise InputError(f"data set {dataset} needs its folder; set dataset.root=FOLDER")
        self.dataset = dataset
        self.root = Path(root)
        self.archives = archives

    def base(self, marker: str, *tops: str) -> Path:
        """Return the folder that holds the sub-folder ``marker``: ``root``, or an archive's own top folder in it.

        ``tops`` are the relative paths of those top folders. Raises InputError otherwise: where the tree lies one or
        two levels above ``root``, or one below, the sentence says so and gives the right ``dataset.root``.
        """

        def holder(root: Path) -> Path | None:
            places = (root, *(root / top for top in tops))
            return next((place for place in places if os.path.isdir(place / marker)), None)

        if found := holder(self.root):
            return found
        root = self.root.absolute()
        for above in list(root.parents)[:2]:
            if holder(above):
                raise InputError(
                    f"dataset.root={root} is too deep for {self.dataset}, whose folder {marker} must lie in it; "
                    f"set dataset.root={above}"
                )
        for below in _subfolders(root):
            if holder(below):
                raise InputError(
                    f"dataset.root={root} is one level too shallow for {self.dataset}, whose folder {marker} must lie "
                    f"in it; set dataset.root={below}"
                )
        top = next((root / top for top in tops if os.path.isdir(root / top)), root)
        return self.folder(top / marker)

    def folder(self, folder: Path) -> Path:
        """Return ``folder`` if it is one; else raise InputError naming it, the archives to unpack and dataset.root."""
        try:
            if folder.is_dir():
                next(folder.iterdir(), None)
                return folder
        except PermissionError:
            raise InputError(
                f"folder {folder} of {self.dataset} may not be read by this user; run `chmod -R u+rX {self.root}`"
            ) from None
        raise InputError(
            f"{self.dataset} is not complete under {self.root}: folder {folder} does not exist{near_miss(folder)}; "
            f"unpack {self.archives} into one folder and set dataset.root to it"
        )

    def files(self, folder: Path, suffix: str) -> dict[str, Path]:
        """Return {name without ``suffix``: path} of the files in ``folder`` that end with it, sorted.

        Hidden files are left out. Raises InputError for a folder that is not there or may not be read.
        """
        entries = visible_entries(self.folder(folder))
        return {e.name.removesuffix(suffix): folder / e.name for e in entries if e.name.endswith(suffix)}

    def lines(self, list_file: Path) -> list[str]:
        """Return the non-empty lines of a list file, stripped.

        Raises InputError for a list that is missing, unreadable or empty.
        """
        text = read_text(
            list_file,
            role="list file",
            missing=f"{self.dataset} lacks its list file {list_file}; unpack {self.archives} into one folder and name "
            "it in dataset.root",
        )
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if not lines:
            raise InputError(
                f"list file {list_file} has no entries, so the split is empty; unpack {self.archives} again"
            )
        return lines

    def entries(self, list_file: Path, folder: Path) -> list[str]:
        """Return the lines of a list of files below ``folder``; raises InputError also for one that is there twice."""
        lines = self.lines(list_file)
        seen: set[str] = set()
        for entry in lines:
            if entry in seen:
                raise InputError(f"list file {list_file} names {entry!r} twice; remove one of the two lines")
            seen.add(entry)
            inside(folder, entry, list_file=list_file)
        return lines

    def listed(self, keys: Sequence[str], files: Mapping[str, Path], *, wanted: str, list_file: Path) -> list[str]:
        """Return the ``keys`` of ``list_file`` that are among ``files``; the others are refused.

        ``wanted`` is the path of a file, with ``{id}``.
        """
        missing = [key for key in keys if key not in files]
        if missing:
            path = Path(wanted.replace("{id}", missing[0]))
            refuse(
                f"{path}, which {list_file} of {self.dataset} names, does not exist{near_miss(path)}{and_more(missing)}"
                f"; unpack {self.archives} again, into one folder"
            )
        return [key for key in keys if key in files]

    def pair(self, images: Mapping[str, Path], labels: Mapping[str, Path], *, image: str, label: str) -> list[Sample]:
        """Return the samples of all ids, in the order of ``images``; an id with only one of the two is refused.

        ``image`` and ``label`` are the paths of both, with ``{id}``, and ``{city}`` for the id up to its first "_".
        """
        for kind, found, other, others, wanted in (
            ("image", images, "label", labels, label),
            ("label", labels, "image", images, image),
        ):
            lonely = [key for key in found if key not in others]
            if lonely:
                path = Path(wanted.replace("{id}", lonely[0]).replace("{city}", lonely[0].split("_")[0]))
                empty = ", write an empty file where nothing is on it," if path.suffix == ".txt" else ""  # of YOLO
                near = near_miss(path, but=found[lonely[0]])
                cure = f"unpack the {other}s again{empty} or remove the {kind}"
                if other == "label" and re.search(r"\.jpe?g is there, whose name differs in its extension", near):
                    cure = "write the labels as PNG from what they were made of, since JPEG changes their values"
                lacks = f"{kind} {found[lonely[0]]} of {self.dataset} has no {other} ({path} is missing{near})"
                refuse(f"{lacks}{and_more(lonely)}; {cure}")
        return [Sample(key, file, (labels[key],)) for key, file in images.items() if key in labels]

    def pairs(self, images: Path, labels: Path, *, suffix: str = ".png") -> list[Sample]:
        """Return the samples of the files <id>.jpg in ``images`` and <id>``suffix`` in ``labels``, as :meth:`pair`."""
        wanted = {"image": f"{images}/{{id}}.jpg", "label": f"{labels}/{{id}}{suffix}"}
        return self.pair(self.files(images, ".jpg"), self.files(labels, suffix), **wanted)


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except (OSError, ValueError):  # a path with a zero byte
        return []


def and_more(missing: Sequence[str]) -> str:
    """Return how many others are missing beside the first, for a sentence; "" if there is none."""
    return f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""


def inside(root: Path, relative: str, *, list_file: Path) -> Path:
    """Return ``root / relative``; raises InputError where the entry of ``list_file`` would leave ``root``.

    Judged by the text alone (no link is followed), so that a data set of symbolic links still works.
    """
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"entry {relative!r} of {list_file} leaves the data set's folder {root}; entries must be names or paths "
            "below dataset.root without '..'"
        )
    return root / path


def near_miss(path: Path, *, but: Path | None = None) -> str:
    """Return which file its user probably meant by a missing ``path``, for a sentence; "" if there is none.

    That is a file beside it, or in a folder whose name differs in case, with the same name but for upper and lower
    case, Unicode form, the extension, or something before or after it (photo_mask.png for photo.png). ``but``: a file
    that is not meant.
    """
    if os.path.isdir(path):
        return ", but must be a file and is a folder"
    folder = path.parent
    if not os.path.isdir(folder):
        folder = next((f for f in _subfolders(folder.parent) if _folded(f.name) == _folded(folder.name)), folder)
    try:
        names = sorted(os.listdir(folder), key=lambda name: (_folded(name) != _folded(path.name), name))
    except (OSError, ValueError):
        return ""
    for name in names:
        how = "in its folder's name" if name == path.name else _difference(path.name, name)
        if how and folder / name != but:
            return f", but {folder / name} is there, whose name differs {how}"
    return ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _difference(wanted: str, found: str) -> str:
    """How the names of two files differ, if they are so alike that they may be meant for one."""
    (stem, suffix), (other, end) = os.path.splitext(_folded(wanted)), os.path.splitext(_folded(found))
    if (stem, suffix) == (other, end):
        same_case = unicodedata.normalize("NFC", wanted) == unicodedata.normalize("NFC", found)
        return "in the Unicode form of its letters only" if same_case else "in upper and lower case only"
    if end not in IMAGE_SUFFIXES | UNREAD:
        return ""
    if stem == other:
        return "in its extension only"
    longer, shorter = sorted((stem, other), key=len, reverse=True)
    extra = longer.removeprefix(shorter) if longer.startswith(shorter) else longer.removesuffix(shorter)
    if shorter and extra != longer and not (extra[0] if longer.startswith(shorter) else extra[-1]).isalnum():
        return f"by {extra!r}"
    return ""
