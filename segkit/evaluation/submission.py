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
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.errors import InputError
from segkit.evaluation.ahead import ahead
from segkit.evaluation.overlay import palette_image

Labels = NDArray[np.uint8]
Size = tuple[int, int]
Prediction = tuple[str, NDArray[np.integer]]
"""Name of an image, and its train ids (H, W)"""
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


@dataclass(frozen=True)
class Submission:
    """An archive as the server of a benchmark wants it: written, checked, read back. All checks raise `InputError`.

    ``format``: a key of `FORMATS`. ``competition`` is VOC's: comp5 (trained on VOC alone) or comp6 (None).
    """

    format: str
    table: LabelTable
    split: str = "test"
    competition: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"there is no submission format {self.format!r}; allowed are {', '.join(FORMATS)}: segkit predict "
                "writes label images of any data"
            )
        if self.competition not in (None, "comp5", "comp6"):
            raise InputError(f"competition is {self.competition!r}; allowed are comp5 (VOC data alone) and comp6")
        if self.competition and "{competition}" not in self.form.folder:
            raise InputError(f"--competition is {self.competition}, but {self.format} has none: leave it out")

    @property
    def form(self) -> Format:
        """How the benchmark wants its files."""
        return FORMATS[self.format]

    def member(self, name: str) -> str:
        """Return the name in the archive of the file for image ``name``."""
        folder = PurePosixPath(self.form.folder.format(competition=self.competition or "comp6", split=self.split))
        return str(folder / f"{name}{self.form.ending}")

    def check_images(self, sizes: Mapping[str, Size]) -> None:
        """Check names, sizes and number of the images of the split before any is predicted.

        The test splits of Cityscapes and BDD100K have one size, and every server wants all images of its test split.
        The error names the first image that the server would refuse.
        """
        form, is_test = self.form, self.split == "test"
        for name, size in sizes.items():
            if not re.fullmatch(form.pattern, name):
                raise InputError(f"image name {name!r} is none of {self.format}; names must match {form.pattern}")
            if is_test and form.test_size is not None and tuple(size) != form.test_size:
                raise InputError(
                    f"{name} has the size {_by(size)}; the test split of {self.format} wants {_by(form.test_size)}: "
                    "point dataset.root (segkit submit --root) to the original images"
                )
        if is_test and form.num_test is not None and len(sizes) != form.num_test:
            raise InputError(
                f"the submission would hold {len(sizes)} images; the test split of {self.format} has {form.num_test}: "
                "complete the data set, or name another split with segkit submit --split"
            )

    def write(self, path: Path, predictions: Iterable[Prediction], sizes: Mapping[str, Size]) -> int:
        """Write predictions, one at a time, check the archive, and return its number of files.

        ``sizes``: names and sizes of all images to come; they go through `check_images` before the first prediction is
        asked for. The archive gets its name once it is complete and right.

        The error names the image for a wrong name, size or value; it is one, too, if there is no prediction.
        """
        self.check_images(sizes)
        temporary = path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")
        written: set[str] = set()
        try:
            with _archive(path, temporary) as add:
                for member, content in ahead(self._encoder(), self._checked(predictions, sizes, written), threads=2):
                    add(member, content)
            if not written:
                raise InputError(f"there is no prediction to write to {path}; check the split")
            self.validate(temporary, sizes)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return len(written)

    def _checked(
        self, predictions: Iterable[Prediction], sizes: Mapping[str, Size], seen: set[str]
    ) -> Iterator[Prediction]:
        """Yield the predictions with the names of their images, each of which may come once; they go into ``seen``."""
        for path, prediction in predictions:
            name = PurePosixPath(path).name
            self._check_prediction(name, prediction, sizes)
            if name in seen:
                raise InputError(f"image {name} was predicted twice; a submission holds every image once")
            seen.add(name)
            yield name, prediction

    def _check_prediction(self, name: str, prediction: NDArray[np.integer], sizes: Mapping[str, Size]) -> None:
        num_classes = len(self.table.classes)
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
        if name not in sizes:
            raise InputError(
                f"the prediction of {name} belongs to no image of split {self.split}; predict exactly its images"
            )
        if prediction.shape != tuple(sizes[name]):
            raise InputError(
                f"the prediction of {name} has the size {_by(prediction.shape)}; {self.format} wants "
                f"{_by(sizes[name])}: predict at the size of the image"
            )

    def _encoder(self) -> Callable[[Prediction], tuple[str, bytes]]:
        """Return the function from a prediction to its file: name in the archive, and PNG bytes."""
        to_raw = np.array([self.table.train_to_raw[k] for k in range(len(self.table.classes))], np.uint8)
        colours = np.zeros((256, 3), np.uint8)
        colours[to_raw] = self.table.palette
        if 255 not in to_raw:
            colours[255] = _VOID_COLOUR

        def encode(named: Prediction) -> tuple[str, bytes]:
            name, prediction = named
            raw = to_raw[prediction]
            image = palette_image(raw, colours) if self.form.palette else Image.fromarray(raw)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return self.member(name), buffer.getvalue()

        return encode

    def validate(self, path: Path, sizes: Mapping[str, Size]) -> int:
        """Check every file of an archive, and return the number of files.

        ``sizes``: image names with (height, width); all of them must be there and no other. The error names the first
        file with a wrong path, kind of PNG, size or value, or files that are missing or too many.
        """
        found: set[str] = set()
        for name, labels in self.read(path):
            found.add(name)
            if name in sizes and tuple(sizes[name]) != labels.shape:
                raise InputError(
                    f"{path}: {name} has the size {_by(labels.shape)}, but its image has {_by(sizes[name])}; "
                    "predict at the size of the label"
                )
        if sizes.keys() != found:
            missing, extra = sorted(sizes.keys() - found), sorted(found - sizes.keys())
            raise InputError(
                f"{path}: {len(missing)} images are missing ({', '.join(missing[:3])}) and {len(extra)} are too many "
                f"({', '.join(extra[:3])}); predict exactly the images of the split"
            )
        return len(found)

    def read(self, path: Path) -> Iterator[tuple[str, Labels]]:
        """Yield ``(image name, train ids uint8 (H, W))``: the inverse of `write`, checking as it reads."""
        to_train = np.full(256, 255, np.uint8)
        raw = list(self.table.train_to_raw.values())
        to_train[raw] = list(self.table.train_to_raw)
        allowed = np.isin(np.arange(256), raw)
        with closing(_members(path)) as members:
            for member, content in members:
                name = PurePosixPath(member).name.removesuffix(self.form.ending)
                if member != self.member(name) or not re.fullmatch(self.form.pattern, name):
                    raise InputError(
                        f"{path}: there is a file {member}; expected are files such as {self.member('NAME')}"
                    )
                raw_labels = _decoded(content, f"{path}: {member}", palette=self.form.palette)
                if not allowed[raw_labels].all():
                    wrong = np.unique(raw_labels[~allowed[raw_labels]])[:5].tolist()
                    raise InputError(
                        f"{path}: {member} has the values {wrong}, which are no label of {self.format}; write train "
                        "ids with `segkit submit`, which maps them"
                    )
                yield name, to_train[raw_labels]


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


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


def check_ending(path: Path) -> None:
    """Raise InputError unless the name of ``path`` says which kind of archive it is."""
    if path.suffix != ".zip" and path.suffix not in _TAR_MODES:
        raise InputError(f"{path} must end in .zip, .tar, .tar.gz or .tgz; give --output such a name")


@contextmanager
def _archive(path: Path, temporary: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Open ``temporary`` as an archive of the kind that ``path`` ends in; yields ``add(member, content)``."""
    check_ending(path)
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
