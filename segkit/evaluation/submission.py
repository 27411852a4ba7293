"""Archives in the form that benchmark servers take: written, checked, and read back.

An archive holds one 8-bit PNG per image with the data set's own label values, at the size of the image. The name of
the file says whether it is a .zip, or a .tar, .tar.gz or .tgz (which the VOC server takes).

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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

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
    """Write predictions, one ``(name, train ids (H, W))`` at a time, check the archive, and return its number of files.

    ``competition`` is VOC's: comp5 (trained on VOC alone) or comp6. ``image_sizes``, if given, are the names and sizes
    of all images to come: they go through `check_images` before the first prediction is asked for. The archive gets
    its name once it is complete and right.

    Raises `InputError` naming the image for a wrong name, size or value, and if there is no prediction.
    """
    rules = _Rules(format, split, competition)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    sizes: dict[str, Size] = {}
    if image_sizes is not None:
        rules.check_images(image_sizes)

    def files() -> Iterator[tuple[str, NDArray[np.integer]]]:
        for name, prediction in predictions:
            name = PurePosixPath(name).name
            rules.check_prediction(name, prediction, num_classes=len(table.classes), image_sizes=image_sizes)
            if name in sizes:
                raise InputError(f"image {name} was predicted twice; a submission holds every image once")
            sizes[name] = (prediction.shape[0], prediction.shape[1])
            yield rules.member(name), prediction

    try:
        with _archive(path, temporary) as add:
            for member, content in _encoded(files(), table, palette=rules.form.palette, threads=threads):
                add(member, content)
        if not sizes:
            raise InputError(f"there is no prediction to write to {path}; check the split")
        rules.check_number(len(sizes))
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
    _Rules(format, split).check_images(image_sizes)


def validate_submission(
    path: str | os.PathLike[str],
    *,
    format: str,
    table: LabelTable,
    sizes: Mapping[str, Size] | None = None,
    split: str = "test",
    competition: str = "comp6",
) -> int:
    """Check every file of an archive, and return the number of files.

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
    rules = _Rules(format, split, competition)
    to_train = np.full(256, 255, np.uint8)
    raw = list(table.train_to_raw.values())
    to_train[raw] = list(table.train_to_raw)
    allowed = np.isin(np.arange(256), raw)
    with closing(_members(Path(path))) as members:
        for member, content in members:
            name = PurePosixPath(member).name.removesuffix(rules.form.ending)
            if member != rules.member(name) or not re.fullmatch(rules.form.pattern, name):
                raise InputError(f"{path}: there is a file {member}; expected are files such as {rules.member('NAME')}")
            raw_labels = _decoded(content, f"{path}: {member}", palette=rules.form.palette)
            if not allowed[raw_labels].all():
                wrong = np.unique(raw_labels[~allowed[raw_labels]])[:5].tolist()
                raise InputError(
                    f"{path}: {member} has the values {wrong}, which are no label of {format}; write train ids "
                    "with `segkit submit`, which maps them"
                )
            yield name, to_train[raw_labels]


@dataclass(frozen=True)
class _Rules:
    """What the server of benchmark ``format`` wants of a split; the checks raise `InputError`."""

    format: str
    split: str
    competition: str = "comp6"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"there is no submission format {self.format!r}; allowed are {', '.join(FORMATS)}: segkit predict "
                "writes label images of any data"
            )
        if self.competition not in ("comp5", "comp6"):
            raise InputError(f"competition is {self.competition!r}; allowed are comp5 (VOC data alone) and comp6")

    @property
    def form(self) -> Format:
        return FORMATS[self.format]

    def member(self, name: str) -> str:
        """Return the name in the archive of the file for image ``name``."""
        folder = PurePosixPath(self.form.folder.format(competition=self.competition, split=self.split))
        return str(folder / f"{name}{self.form.ending}")

    def check_images(self, sizes: Mapping[str, Size]) -> None:
        for name, size in sizes.items():
            self.check_name(name)
            self.check_official_size(name, size)
        self.check_number(len(sizes))

    def check_prediction(
        self, name: str, prediction: NDArray[np.integer], *, num_classes: int, image_sizes: Mapping[str, Size] | None
    ) -> None:
        self.check_name(name)
        if prediction.ndim != 2 or prediction.dtype.kind not in "iu":
            raise InputError(
                f"the prediction of {name} must hold class numbers (H, W), got {prediction.dtype} of shape "
                f"{prediction.shape}"
            )
        if prediction.size and not (prediction.min() >= 0 and prediction.max() < num_classes):
            raise InputError(
                f"the prediction of {name} has values from {prediction.min()} to {prediction.max()}; allowed are the "
                f"classes 0..{num_classes - 1}"
            )
        self.check_official_size(name, prediction.shape)
        if image_sizes is None:
            return
        if name not in image_sizes:
            raise InputError(
                f"the prediction of {name} belongs to no image of split {self.split}; predict exactly its images"
            )
        if prediction.shape != tuple(image_sizes[name]):
            raise InputError(
                f"the prediction of {name} has the size {_by(prediction.shape)}; {self.format} wants "
                f"{_by(image_sizes[name])}: predict at the size of the image"
            )

    def check_name(self, name: str) -> None:
        if not re.fullmatch(self.form.pattern, name):
            raise InputError(f"image name {name!r} is none of {self.format}; names must match {self.form.pattern}")

    def check_official_size(self, name: str, size: tuple[int, ...]) -> None:
        official = self.form.test_size
        if self.split == "test" and official is not None and tuple(size) != official:
            raise InputError(
                f"{name} has the size {_by(size)}; the test split of {self.format} wants {_by(official)}: point "
                "dataset.root (segkit submit --root) to the original images"
            )

    def check_number(self, num_files: int) -> None:
        official = self.form.num_test
        if self.split == "test" and official is not None and num_files != official:
            raise InputError(
                f"the submission would hold {num_files} images; the test split of {self.format} has {official}: "
                "complete the data set, or name another split with segkit submit --split"
            )


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


def _encoded(
    files: Iterable[tuple[str, NDArray[np.integer]]], table: LabelTable, *, palette: bool, threads: int
) -> Iterator[tuple[str, bytes]]:
    """Yield the PNG bytes of every file in order; a few are encoded at a time."""
    to_raw = np.array([table.train_to_raw[k] for k in range(len(table.classes))], np.uint8)
    colours = np.zeros((256, 3), np.uint8)
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


@contextmanager
def _archive(path: Path, temporary: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Open ``temporary`` as an archive of the kind that ``path`` ends in; yields ``add(member, content)``."""
    if path.suffix != ".zip" and path.suffix not in _TAR_MODES:
        raise InputError(f"{path} must end in .zip, .tar, .tar.gz or .tgz; give --output such a name")
    try:
        archive: Any = (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED)  # PNG is compressed already
            if path.suffix == ".zip"
            else tarfile.open(temporary, _TAR_MODES[path.suffix])  # type: ignore[call-overload]  # noqa: SIM115
        )
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give --output another folder") from error

    def add(member: str, content: bytes) -> None:
        info = tarfile.TarInfo(member)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    with archive:
        yield archive.writestr if path.suffix == ".zip" else add


def _members(path: Path) -> Generator[tuple[str, bytes], None, None]:
    """Yield names and contents of the files of an archive, whatever its name. No file is unpacked to disk."""
    if not path.is_file():
        raise InputError(f"there is no archive {path}; `segkit submit` writes it")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            _check_unique(path, names)
            for name in names:
                yield name, archive.read(name)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
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
