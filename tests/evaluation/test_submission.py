"""Archives of every benchmark: what they hold, that they re-score to the same figure, and what is refused."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.data.labels import load_table
from segkit.errors import InputError
from segkit.evaluation import ConfusionMatrix
from segkit.evaluation.submission import FORMATS, Submission

NAMES = {
    "cityscapes": ("lindau_000000_000019", "frankfurt_000001_002512"),
    "ade20k": ("ADE_val_00000001", "ADE_val_00000002"),
    "voc": ("2007_000033", "2007_000042"),
    "bdd100k": ("7d06fefd-f7be05a6", "7d128593-0ccfea4c"),
    "mapillary": ("-6YY1R4OJZ4oBfCfnHjqPA", "_3yJ-HPZJZ4oBfCfnHjqPA"),
    "cocostuff10k": ("COCO_train2014_000000000077", "COCO_train2014_000000000092"),
}
MEMBERS = {
    "cityscapes": "lindau_000000_000019_labelIds.png",
    "ade20k": "ADE_val_00000001.png",
    "voc": "results/VOC2012/Segmentation/comp6_val_cls/2007_000033.png",
    "bdd100k": "7d06fefd-f7be05a6.png",
    "mapillary": "-6YY1R4OJZ4oBfCfnHjqPA.png",
    "cocostuff10k": "COCO_train2014_000000000077.png",
}
RAW = {
    "cityscapes": [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33],
    "ade20k": list(range(1, 151)),
    "voc": list(range(21)),
    "bdd100k": list(range(19)),
    "mapillary": list(range(65)),
    "cocostuff10k": [i for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)],
}


def predictions(format, table):
    """One map with every class and one of another size."""
    rng = np.random.default_rng(0)
    first = np.resize(np.arange(len(table.classes), dtype=np.uint8), (20, 30))
    second = rng.integers(0, len(table.classes), (25, 18)).astype(np.uint8)
    return list(zip(NAMES[format], (first, second), strict=True))


def submission(format, split="val", **options):
    return Submission(format, load_table(format) if format in NAMES else None, split, **options)


def written(format, path, **options):
    form = submission(format, **options)
    table = form.table
    given = predictions(format, table)
    assert form.write(path, iter(given), {name: prediction.shape for name, prediction in given}) == 2
    return table, given


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_members_kind_and_values(format, tmp_path):
    path = tmp_path / "out.zip"
    _, given = written(format, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == MEMBERS[format]
        image = Image.open(io.BytesIO(archive.read(MEMBERS[format])))
    assert image.format == "PNG"
    assert image.mode == ("P" if format == "voc" else "L")
    assert image.size == (30, 20)
    raw = np.asarray(image)
    assert sorted(set(raw.flatten().tolist())) == RAW[format]
    np.testing.assert_array_equal(raw, np.array(RAW[format])[given[0][1]])
    assert [p.name for p in tmp_path.iterdir()] == ["out.zip"]


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_files_read_back_score_the_same(format, ending, tmp_path):
    table, given = written(format, tmp_path / f"out{ending}")
    rng = np.random.default_rng(1)
    labels = {}
    for name, prediction in given:
        target = np.where(rng.random(prediction.shape) < 0.6, prediction, 0).astype(np.uint8)
        target[0] = 255
        labels[name] = target
    internal, exported = ConfusionMatrix(len(table.classes)), ConfusionMatrix(len(table.classes))
    for name, prediction in given:
        internal.update(torch.from_numpy(prediction), torch.from_numpy(labels[name]))
    for name, prediction in submission(format).read(tmp_path / f"out{ending}"):
        exported.update(torch.from_numpy(prediction), torch.from_numpy(labels[name]))
    assert 0.3 < internal.mean_iou() < 1
    assert torch.equal(internal.counts, exported.counts)


def test_voc_has_its_palette_and_both_competitions(tmp_path):
    table, _ = written("voc", tmp_path / "out.tgz", competition="comp5")
    with tarfile.open(tmp_path / "out.tgz", "r:gz") as archive:
        member = archive.getmembers()[0]
        assert member.name == "results/VOC2012/Segmentation/comp5_val_cls/2007_000033.png"
        image = Image.open(io.BytesIO(archive.extractfile(member).read()))
    palette = np.array(image.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(palette[:21], table.palette)
    assert palette[15].tolist() == [192, 128, 128]  # person
    with pytest.raises(InputError, match=r"competition is 'comp7'; allowed are comp5 \(VOC data alone\) and comp6"):
        written("voc", tmp_path / "out.zip", competition="comp7")
    with pytest.raises(InputError, match=r"--competition is comp5, but ade20k has none: leave it out"):
        written("ade20k", tmp_path / "out.zip", competition="comp5")


def test_official_cityscapes_pattern_finds_the_file():
    fnmatch = pytest.importorskip("fnmatch")
    assert fnmatch.fnmatch(MEMBERS["cityscapes"], "lindau_000000_000019*.png")


class Case(NamedTuple):
    message: str
    names: tuple[str, ...] = ("ADE_val_00000001",)
    maps: tuple = (np.zeros((4, 5), np.uint8),)
    options: dict = {}  # noqa: RUF012
    sizes: dict | None = None
    path: str = "out.zip"


ONE = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    "case",
    [
        Case(r"image name 'street' is none of ade20k; names must match ADE_", names=("street",)),
        Case(
            r"prediction of ADE_val_00000001 has values from 0 to 150; allowed .* 0\.\.149",
            maps=(np.full((4, 5), 150) * np.eye(4, 5, dtype=int),),
        ),
        Case(r"must hold class numbers \(H, W\), got float64 of shape \(4, 5\)", maps=(ONE.astype(float),)),
        Case(r"must hold class numbers \(H, W\), got uint8 of shape \(4, 5, 1\)", maps=(ONE[..., None],)),
        Case(r"was predicted twice", names=("ADE_val_00000001",) * 2, maps=(ONE, ONE)),
        Case(r"there is no prediction to write to .*out\.zip", names=(), maps=()),
        Case(r"would hold 1 images; the test split of ade20k has 3352", options={"split": "test"}),
        Case(
            r"has the size 4x5 \(height x width\); ade20k wants 8x5",
            sizes={"ADE_val_00000001": (8, 5)},
        ),
        Case(
            r"prediction of ADE_val_00000001 belongs to no image of split val; predict exactly",
            sizes={"ADE_val_00000002": (4, 5)},
        ),
        Case(
            r"1 images are missing \(ADE_val_00000002\) and 0 are too many",
            sizes={"ADE_val_00000001": (4, 5), "ADE_val_00000002": (4, 5)},
        ),
        Case(r"out\.rar must end in \.zip, \.tar, \.tar\.gz or \.tgz", path="out.rar"),
        Case(
            r"format 'kitti'; allowed are cityscapes, ade20k.*: segkit predict writes",
            options={"format": "kitti"},
        ),
        Case(r"cannot write .*no/out\.zip \(No such file", path="no/out.zip"),
    ],
    ids=lambda case: re.sub(r"\W+", " ", case.message)[:30],
)
def test_what_cannot_be_written_is_named_and_leaves_no_file(case, tmp_path):
    given = list(zip(case.names, case.maps, strict=True))
    sizes = {name: one.shape[:2] for name, one in given} if case.sizes is None else case.sizes
    with pytest.raises(InputError, match=case.message):
        submission(**{"format": "ade20k", **case.options}).write(tmp_path / case.path, given, sizes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "size"), [("cityscapes", "1024x2048"), ("bdd100k", "720x1280")])
def test_test_splits_of_one_size(format, size, tmp_path):
    name = NAMES[format][0]
    message = (
        rf"{name} has the size 4x5 .*; the test split of {format} wants {size} .*: point dataset\.root .* original"
    )
    with pytest.raises(InputError, match=message):
        submission(format, "test").write(tmp_path / "out.zip", [(name, ONE)], {name: (4, 5)})
    with pytest.raises(InputError, match=message):
        submission(format, "test").check_images({name: (4, 5)})
    submission(format).check_images({name: (4, 5)})


def test_images_are_checked_before_any_is_predicted(tmp_path):
    def never():
        raise AssertionError("a prediction was asked for")
        yield

    form = submission("bdd100k", "test")
    sizes = {f"{number:08x}-{number:08x}": (720, 1280) for number in range(1999)}
    with pytest.raises(InputError, match=r"would hold 1999 images; the test split of bdd100k has 2000: complete"):
        form.write(tmp_path / "out.zip", never(), sizes)
    with pytest.raises(InputError, match=r"image name 'street' is none of bdd100k"):
        form.write(tmp_path / "out.zip", never(), {"street": (720, 1280)})
    form.check_images(sizes | {"ffffffff-ffffffff": (720, 1280)})


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"deep/ADE_val_00000001.png": png(ONE + 1)}, r"there is a file deep/ADE_val_00000001\.png; expected are"),
        ({"ADE_val_00000001.txt": b"text"}, r"there is a file ADE_val_00000001\.txt"),
        (
            {"ADE_val_00000001.png": png(ONE)},
            r"ADE_val_00000001\.png has the values \[0\], which are no label of ade20k",
        ),
        ({"ADE_val_00000001.png": b"text"}, r"ADE_val_00000001\.png cannot be read as an image"),
        ({"ADE_val_00000001.png": png(ONE + 1)[:-20]}, r"ADE_val_00000001\.png cannot be read as an image"),
        (
            {"ADE_val_00000001.png": png(np.ones((4, 5, 3), np.uint8))},
            r"is PNG of mode RGB; the format wants an 8-bit PNG of mode L",
        ),
        ({"ADE_val_00000001.png": png(ONE + 1, format="BMP")}, r"is BMP of mode L; the format wants an 8-bit PNG"),
        ({"ADE_val_00000001.png": png(ONE.T.copy() + 1)}, r"has the size 5x4 .* its image has 4x5"),
        (
            {"ADE_val_00000002.png": png(ONE + 1)},
            r"1 images are missing \(ADE_val_00000001\) and 1 are too many \(ADE_val_00000002\)",
        ),
    ],
)
def test_archives_that_are_wrong(members, message, tmp_path):
    path = tmp_path / "out.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=message):
        submission("ade20k").validate(path, {"ADE_val_00000001": (4, 5)})


def test_files_that_are_no_archive_or_hold_a_file_twice(tmp_path):
    form = submission("ade20k", "test")
    with pytest.raises(InputError, match=r"there is no archive .*none\.zip"):
        form.validate(tmp_path / "none.zip", {})
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(InputError, match=r"text\.zip is neither a zip nor a tar archive"):
        form.validate(tmp_path / "text.zip", {})
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("ADE_val_00000001.png")
            info.size = len(png(ONE + 1))
            archive.addfile(info, io.BytesIO(png(ONE + 1)))
    with pytest.raises(InputError, match=r"twice\.tar holds ADE_val_00000001\.png twice"):
        form.validate(tmp_path / "twice.tar", {})


@pytest.mark.data
def test_a_real_label_of_each_kind_comes_back(shared_data, tmp_path):
    pairs = {
        "ade20k": "ade20k/ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
        "cityscapes": "cityscapes/gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png",
    }
    for format, file in pairs.items():
        path = shared_data / "samples" / file
        table = load_table(format)
        raw = np.asarray(Image.open(path))
        label = table.to_train(raw, file=path)
        counted = label != 255
        prediction = np.where(counted, label, 0)
        name = path.stem.removesuffix("_gtFine_labelIds")
        out = tmp_path / f"{format}.zip"
        form = submission(format)
        form.write(out, [(name, prediction)], {name: prediction.shape})
        with zipfile.ZipFile(out) as archive:
            exported = np.asarray(Image.open(io.BytesIO(archive.read(archive.namelist()[0]))))
        np.testing.assert_array_equal(exported[counted], raw[counted])
        ((_, back),) = form.read(out)
        np.testing.assert_array_equal(back, prediction)
