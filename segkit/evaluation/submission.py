"""Archives in the form that benchmark servers take: written, checked, and read back.

An archive holds one 8-bit PNG per image with the data set's own label values, at the size of the image. It is a
.zip, or a .tar, .tar.gz or .tgz (what the VOC server takes), by the name of the file.

=============  ==========================================================  ===============================
format         member                                                      values
=============  ==========================================================  ===============================
cityscapes     <city>_<sequence>_<frame>_labelIds.png                      regular ids (7, 8, 11, ...)
ade20k         <name>.png                                                  1..150
voc            results/VOC2012/Segmentation/comp6_test_cls/<name>.png      0..20, palette PNG
bdd100k        <name>.png                                                  train ids 0..18
mapillary      <name>.png                                                  indices of the configuration 0..64
cocostuff10k   <name>.png                                                  1..182 (there is no server)
=============  ==========================================================  ===============================
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.errors import InputError

Labels = NDArray[np.uint8]
Size = tuple[int, int]
_VOID_COLOUR = (224, 224, 192)
_TAR_MODES = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz"}


class LabelTable(Protocol):
    """What is needed of a label table."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def palette(self) -> np.ndarray: ...
    @property
    def train_to_raw(self) -> dict[int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one benchmark wants its files."""

    pattern: str
    """Regular expression that the name of an image must match as a whole"""
    folder: str = ""
    ending: str = ".png"
    palette: bool = False
    test_size: Size | None = None
    num_test: int | None = None


FORMATS: Mapping[str, Format] = {
    "cityscapes": Format(pattern=r"[a-z-]+_\d{6}_\d{6}", ending="_labelIds.png", test_size=(1024, 2048), num_test=1525),
    "ade20k": Format(pattern=r"ADE_(test|val|train)_\d{8}", num_test=3352),
    "voc": Format(
        pattern=r"\d{4}_\d{6}",
        folder="results/VOC2012/Segmentation/{competition}_{split}_cls",
        palette=True,
        num_test=1456,
    ),
    "bdd100k": Format(pattern=r"[0-9a-f]{8}-[0-9a-f]{8}", test_size=(720, 1280), num_test=2000),
    "mapillary": Format(pattern=r"[\w-]{22}", num_test=5000),
    "cocostuff10k": Format(pattern=r"COCO_(train|val)2014_\d{12}"),
}


def write_submission(
    path: str | os.PathLike[str],
    predictions: Iterable[tuple[str, NDArray[np.integer]]],
    *,
    format: str,
    table: LabelTable,
    split: str = "test",
    competition: str = "comp6",
    image_sizes: Mapping[str, Size] | None = None,
    threads: int = 2,
) -> int:
    """Write predictions, one ``(name, train ids (H, W))`` at a time, and check the archive; the number of files.

    ``competition`` is VOC's: comp5 (trained on VOC alone) or comp6. ``image_sizes``, where given, are the names and
    sizes of all images to come: they go through `check_images` before the first prediction is asked for. The archive
    gets its name when it is complete and right.

    Raises `InputError` naming the image for a wrong name, size or value, and if there is no prediction.
    """
    form = _format(format, competition)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    member = _member_namer(form, split, competition)
    sizes: dict[str, Size] = {}
    if image_sizes is not None:
        check_images(image_sizes, format=format, split=split)

    def files() -> Iterator[tuple[str, NDArray[np.integer]]]:
        for name, prediction in predictions:
            name = PurePosixPath(name).name
            _check_prediction(name, prediction, form, format, table, split, image_sizes)
            if name in sizes:
                raise InputError(f"image {name} was predicted twice; a submission holds every image once")
            sizes[name] = (prediction.shape[0], prediction.shape[1])
            yield member(name), prediction

    try:
        with _Archive(path, temporary) as archive:
            for member_name, content in _encoded(files(), table, palette=form.palette, threads=threads):
                archive.add(member_name, content)
        if not sizes:
            raise InputError(f"there is no prediction to write to {path}; check the split")
        _check_number(len(sizes), form, format, split)
        expected = sizes if image_sizes is None else image_sizes
        validate_submission(temporary, format=format, table=table, sizes=expected, split=split, competition=competition)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(sizes)


def check_images(image_sizes: Mapping[str, Size], *, format: str, split: str = "test") -> None:
    """Check names, sizes and number of the images of a split before any is predicted.

    The test splits of Cityscapes and BDD100K have one size, and every server wants all images of its test split.
    Raises `InputError` that names the first image that the server would refuse.
    """
    form = _format(format, "comp6")
    for name, size in image_sizes.items():
        _check_name(name, form, format)
        _check_official_size(name, size, form, format, split)
    _check_number(len(image_sizes), form, format, split)


def validate_submission(
    path: str | os.PathLike[str],
    *,
    format: str,
    table: LabelTable,
    sizes: Mapping[str, Size] | None = None,
    split: str = "test",
    competition: str = "comp6",
) -> int:
    """Check every file of an archive; the number of files.

    ``sizes``: image names with (height, width); all of them must be there and no other. Raises `InputError` that
    names the first file with a wrong path, kind of PNG, size or value, or files that are missing or too many.
    """
    found: dict[str, Size] = {}
    for name, labels in read_submission(path, format=format, table=table, split=split, competition=competition):
        found[name] = (labels.shape[0], labels.shape[1])
        if sizes is not None and name in sizes and tuple(sizes[name]) != found[name]:
            raise InputError(
                f"{path}: {name} has the size {_by(found[name])}, but its image has {_by(sizes[name])}; "
                "predict at the size of the label"
            )
    if sizes is not None and sizes.keys() != found.keys():
        missing, extra = sorted(sizes.keys() - found.keys()), sorted(found.keys() - sizes.keys())
        raise InputError(
            f"{path}: {len(missing)} images are missing ({', '.join(missing[:3])}) and {len(extra)} are too many "
            f"({', '.join(extra[:3])}); predict exactly the images of the split"
        )
    return len(found)


def read_submission(
    path: str | os.PathLike[str], *, format: str, table: LabelTable, split: str = "test", competition: str = "comp6"
) -> Iterator[tuple[str, Labels]]:
    """Yield ``(image name, train ids uint8 (H, W))``: the inverse of `write_submission`, checking as it reads."""
    form = _format(format, competition)
    member = _member_namer(form, split, competition)
    to_train = np.full(256, 255, np.uint8)
    for train_id, raw in table.train_to_raw.items():
        to_train[raw] = train_id
    allowed = np.zeros(256, bool)
    allowed[list(table.train_to_raw.values())] = True
    with ExitStack() as stack:
        for member_name, content in _members(Path(path), stack):
            name = PurePosixPath(member_name).name.removesuffix(form.ending)
            if member_name != member(name) or not re.fullmatch(form.pattern, name):
                raise InputError(f"{path}: there is a file {member_name}; expected are files such as {member('NAME')}")
            raw_labels = _decoded(content, f"{path}: {member_name}", palette=form.palette)
            if not allowed[raw_labels].all():
                wrong = np.unique(raw_labels[~allowed[raw_labels]])[:5].tolist()
                raise InputError(
                    f"{path}: {member_name} has the values {wrong}, which are no label of {format}; write train ids "
                    "with `segkit submit`, which maps them"
                )
            yield name, to_train[raw_labels]


def _format(name: str, competition: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"there is no submission format {name!r}; allowed are {', '.join(FORMATS)}")
    if competition not in ("comp5", "comp6"):
        raise InputError(f"competition is {competition!r}; allowed are comp5 (VOC data alone) and comp6")
    return FORMATS[name]


def _member_namer(form: Format, split: str, competition: str) -> Callable[[str], str]:
    folder = PurePosixPath(form.folder.format(competition=competition, split=split))
    return lambda name: str(folder / f"{name}{form.ending}")


def _check_prediction(
    name: str,
    prediction: NDArray[np.integer],
    form: Format,
    format: str,
    table: LabelTable,
    split: str,
    image_sizes: Mapping[str, Size] | None,
) -> None:
    _check_name(name, form, format)
    if prediction.ndim != 2 or prediction.dtype.kind not in "iu":
        raise InputError(
            f"the prediction of {name} must hold class numbers (H, W), got {prediction.dtype} of shape "
            f"{prediction.shape}"
        )
    num_classes = len(table.classes)
    if prediction.size and not (prediction.min() >= 0 and prediction.max() < num_classes):
        raise InputError(
            f"the prediction of {name} has values from {prediction.min()} to {prediction.max()}; allowed are the "
            f"classes 0..{num_classes - 1}"
        )
    _check_official_size(name, (prediction.shape[0], prediction.shape[1]), form, format, split)
    if image_sizes is None:
        return
    if name not in image_sizes:
        raise InputError(f"the prediction of {name} belongs to no image of split {split}; predict exactly its images")
    if prediction.shape != tuple(image_sizes[name]):
        raise InputError(
            f"the prediction of {name} has the size {_by(prediction.shape)}; {format} wants {_by(image_sizes[name])}: "
            "predict at the size of the image"
        )


def _check_name(name: str, form: Format, format: str) -> None:
    if not re.fullmatch(form.pattern, name):
        raise InputError(f"image name {name!r} is none of {format}; names must match {form.pattern}")


def _check_official_size(name: str, size: Size, form: Format, format: str, split: str) -> None:
    if split == "test" and form.test_size is not None and tuple(size) != form.test_size:
        raise InputError(
            f"{name} has the size {_by(size)}; the test split of {format} wants {_by(form.test_size)}: point "
            "dataset.root (segkit submit --root) to the original images"
        )


def _check_number(num_files: int, form: Format, format: str, split: str) -> None:
    if split == "test" and form.num_test is not None and num_files != form.num_test:
        raise InputError(
            f"the submission would hold {num_files} images; the test split of {format} has {form.num_test}: complete "
            "the data set, or name another split with segkit submit --split"
        )


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


def _encoded(
    files: Iterable[tuple[str, NDArray[np.integer]]], table: LabelTable, *, palette: bool, threads: int
) -> Iterator[tuple[str, bytes]]:
    """PNG bytes of every file in order; a few are encoded at a time."""
    to_raw = np.array([table.train_to_raw[k] for k in range(len(table.classes))], np.uint8)
    colours = np.full((256, 3), 0, np.uint8)
    colours[to_raw] = table.palette
    if 255 not in to_raw:
        colours[255] = _VOID_COLOUR

    def encode(prediction: NDArray[np.integer]) -> bytes:
        image = Image.fromarray(to_raw[prediction])
        if palette:
            image.putpalette(colours.tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    waiting: deque[tuple[str, Future[bytes]]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for name, prediction in files:
            waiting.append((name, pool.submit(encode, prediction)))
            if len(waiting) > 2 * threads:
                first, content = waiting.popleft()
                yield first, content.result()
        while waiting:
            first, content = waiting.popleft()
            yield first, content.result()


def _decoded(content: bytes, where: str, *, palette: bool) -> Labels:
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, mode = image.format, image.mode
            labels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{where} cannot be read as an image ({error}); write the archive again") from error
    wanted = "P" if palette else "L"
    if (kind, mode) != ("PNG", wanted):
        raise InputError(f"{where} is {kind} of mode {mode}; the format wants an 8-bit PNG of mode {wanted}")
    return labels


class _Archive:
    """A zip or tar under a temporary name; its kind follows from the name it will get."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        try:
            if path.suffix == ".zip":
                # PNG is compressed already.
                self._zip = zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED)
            elif path.suffix in _TAR_MODES:
                self._tar = tarfile.open(temporary, _TAR_MODES[path.suffix])  # type: ignore[call-overload]  # noqa: SIM115
            else:
                raise InputError(f"{path} must end in .zip, .tar, .tar.gz or .tgz; give --output such a name")
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror}); give --output another folder") from error

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *error: object) -> None:
        for archive in (self._zip, self._tar):
            if archive is not None:
                archive.close()

    def add(self, member: str, content: bytes) -> None:
        if self._zip is not None:
            self._zip.writestr(member, content)
            return
        assert self._tar is not None
        info = tarfile.TarInfo(member)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))


def _members(path: Path, stack: ExitStack) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of an archive (of whatever name). No file is unpacked to disk."""
    if not path.is_file():
        raise InputError(f"there is no archive {path}; `segkit submit` writes it")
    if zipfile.is_zipfile(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        _check_unique(path, names)
        for name in names:
            yield name, archive.read(name)
    elif tarfile.is_tarfile(path):
        tar = stack.enter_context(tarfile.open(path))  # noqa: SIM115
        members = [member for member in tar.getmembers() if member.isfile()]
        _check_unique(path, [member.name for member in members])
        for member in members:
            content = tar.extractfile(member)
            assert content is not None
            yield member.name, content.read()
    else:
        raise InputError(f"{path} is neither a zip nor a tar archive; write it again with `segkit submit`")


def _check_unique(path: Path, names: list[str]) -> None:
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise InputError(f"{path} holds {twice[0]} twice; write the archive again")
