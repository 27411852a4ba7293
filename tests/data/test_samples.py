"""Sample sets, opening by name, and what readers share."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkit.config.compose import config_dir
from segkit.data import Sample, SampleSet, open_dataset
from segkit.data.labels import table_from_dict
from segkit.data.layout import Layout, inside, near_miss
from segkit.data.loader import Draw, crop_of
from segkit.data.statistics import count_labels
from segkit.data.transforms import TrainTransform
from segkit.errors import InputError

TABLE = table_from_dict(
    {
        "name": "toy",
        "classes": ["a", "b"],
        "palette": [[0, 0, 0], [9, 9, 9]],
        "raw_to_train": {"0": 0, "1": 1, "9": 255},
    }
)


def constant_label(sample, *, value):
    return np.full((4, 6), value, np.int32)


def black_image(sample):
    return np.zeros((4, 6, 3), np.uint8)


def made(samples, **options):
    return SampleSet(samples, table=TABLE, name="toy", split="train", **options)


def pair_of_files(folder, name, *, size=(4, 6), label_size=None):
    rng = np.random.default_rng(0)
    image, label = folder / f"{name}.png", folder / f"{name}_label.png"
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
    Image.fromarray(rng.integers(0, 2, label_size or size, dtype=np.uint8)).save(label)
    return Sample(name=name, image=image, labels=(label,))


def test_items(tmp_path):
    data = made([pair_of_files(tmp_path, "x"), pair_of_files(tmp_path, "y")], notes=["left out z"])
    assert len(data) == 2
    assert [item.name for item in data] == ["x", "y"]
    assert data[-1].name == "y"
    item = data[0]
    np.testing.assert_array_equal(item.image, np.asarray(Image.open(tmp_path / "x.png")))
    np.testing.assert_array_equal(item.label, np.asarray(Image.open(tmp_path / "x_label.png")))
    np.testing.assert_array_equal(data.image(0), item.image)
    np.testing.assert_array_equal(data.label(0), item.label)
    assert (data.classes, data.num_classes, data.ignore_index) == (("a", "b"), 2, 255)
    assert data.notes == ("left out z",)
    with pytest.raises(IndexError):
        data[2]


def test_slice_keeps_everything_but_the_samples(tmp_path):
    data = made([pair_of_files(tmp_path, name) for name in "xyz"], notes=["n"])
    part = data[1:]
    assert isinstance(part, SampleSet)
    assert [item.name for item in part] == ["y", "z"]
    assert (part.table, part.name, part.split, part.notes) == (data.table, "toy", "train", ("n",))


def test_own_reading_functions_and_pickling():
    sample = Sample(name="s", image=Path("nowhere"), labels=(Path("nowhere"),))
    data = made([sample], load_image=black_image, load_label=partial(constant_label, value=9))
    again = pickle.loads(pickle.dumps(data))
    assert (again[0].label == 255).all()
    assert again[0].label.dtype == np.uint8
    wrong = made([sample], load_image=black_image, load_label=partial(constant_label, value=7))
    with pytest.raises(InputError, match=r"nowhere has values .* 7 \(24 pixels\)"):
        wrong[0]


def test_size_mismatch_names_both_files(tmp_path):
    data = made([pair_of_files(tmp_path, "x", size=(4, 6), label_size=(6, 4))])
    expected = r"image .*x\.png is 6x4 but its label .*x_label\.png is 4x6; both must have the same size: mend"
    with pytest.raises(InputError, match=expected):
        data[0]
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (6, 4)).save(data.samples[0].image, exif=exif)
    with pytest.raises(InputError, match=r"the same size: turn the pixels of the image and remove its orientation tag"):
        data[0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "ppm"])
def test_a_file_that_was_cut_off_is_refused_when_labels_are_counted(tmp_path, monkeypatch, suffix):
    """Its header is whole, so that a training would meet it hours later; whole files are not decoded for it."""
    image, label = tmp_path / f"x.{suffix}", tmp_path / "label.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(image)
    Image.new("L", (60, 40)).save(label)
    data, content = made([Sample(name="x", image=image, labels=(label,))]), image.read_bytes()
    with monkeypatch.context() as patch:
        if suffix != "ppm":  # which says nothing of its length
            patch.setattr(SampleSet, "image", lambda *_: pytest.fail("it is decoded"))
        data.check_file(0, (40, 60))
    for changed in (content + b"a camera's own words" * 9, content[:-9] + b"\0" * 9)[: suffix in ("png", "jpg")]:
        image.write_bytes(changed)
        data.check_file(0, (40, 60))
    for changed in (content[:-100], content[:-100] + b"\0" * 100)[: 2 if suffix in ("png", "jpg") else 1]:
        image.write_bytes(changed)
        with pytest.raises(InputError, match=rf"x\.{suffix} is damaged or no image file .*copy or unpack it again"):
            count_labels(data, workers=0)


def test_an_image_of_twice_the_size_is_refused_also_where_half_of_it_is_decoded(tmp_path):
    image, label = tmp_path / "x.jpg", tmp_path / "x.png"
    Image.new("RGB", (60, 40)).save(image)
    Image.new("L", (30, 20)).save(label)
    data, transform = made([Sample("x", image, (label,))]), TrainTransform(crop=(8, 8), scale=(0.4, 0.4))
    with pytest.raises(InputError, match=r"x\.jpg is 60x40 but its label .*x\.png is 30x20"):
        crop_of(data, transform, Draw(0, -1, (0,)))
    Image.new("CMYK", (30, 20)).save(image)  # which is never decoded at half its size
    assert crop_of(data, transform, Draw(0, -1, (0,)))[0].shape == (8, 8, 3)


def test_empty_split():
    with pytest.raises(InputError, match=r"split 'train' of toy has no samples; check dataset\.root"):
        made([])


def test_duplicate_names():
    samples = [Sample(name="x", image=Path("p/x.png")), Sample(name="x", image=Path("q/x.png"))]
    with pytest.raises(InputError, match=r"'x' occurs twice in split 'train' of toy \(p/x\.png and q/x\.png\)"):
        made(samples)


def test_partly_labelled_split(tmp_path):
    samples = [pair_of_files(tmp_path, "x"), Sample(name="y", image=Path("y.png"))]
    with pytest.raises(InputError, match=r"image y\.png has no label, while other images"):
        made(samples)


def test_unlabelled_split_gives_ignored_pixels(tmp_path):
    sample = pair_of_files(tmp_path, "x")
    data = made([Sample(name="x", image=sample.image)])
    assert not data.labelled
    assert (data[0].label == 255).all()
    assert data[0].label.shape == (4, 6)
    with pytest.raises(InputError, match=r"split 'train' of toy has no labels; use a labelled split"):
        data.label(0)


def test_open_by_name_equals_the_reader():
    by_name = open_dataset("synthetic", split="val", num_images=3, size=[64, 80])
    from segkit.synthetic.dataset import read

    direct = read(split="val", num_images=3, size=(64, 80))
    assert [s.name for s in by_name.samples] == [s.name for s in direct.samples]
    np.testing.assert_array_equal(by_name[2].image, direct[2].image)


def test_every_config_names_a_reader():
    files = sorted((config_dir() / "dataset").glob("*.yaml"))
    assert len(files) >= 4
    for path in files:
        if path.stem == "synthetic":
            continue
        with pytest.raises(InputError, match=r"/nonexistent/folder"):
            open_dataset(path.stem, root="/nonexistent/folder", split="train")


def test_unknown_data_set_split_and_option():
    with pytest.raises(InputError, match=r"no data set 'cityscape': did you mean cityscapes\? .* has .*camvid"):
        open_dataset("cityscape", split="train")
    with pytest.raises(InputError, match=r"synthetic has no option 'sise'; its options are: num_images, seed, size"):
        open_dataset("synthetic", split="train", sise=[1, 2])
    with pytest.raises(InputError, match="synthetic has no split 'tran'; allowed are train, val, test"):
        open_dataset("synthetic", split="tran")
    with pytest.raises(InputError, match="no option '_target_'"):
        open_dataset("synthetic", split="train", _target_="os.system")


def test_a_root_is_needed():
    with pytest.raises(InputError, match=r"data set toy needs its folder; set dataset\.root=FOLDER"):
        Layout("toy", None, archives="a.zip")


def test_missing_folder_names_archives_and_guesses_the_level(tmp_path):
    (tmp_path / "top" / "images").mkdir(parents=True)
    for root, how in ((tmp_path, "one level too shallow"), (tmp_path / "top" / "images", "too deep")):
        expected = rf"={root} is {how} for toy, whose folder images .*; set dataset\.root={tmp_path / 'top'}$"
        with pytest.raises(InputError, match=expected):
            Layout("toy", root, archives="a.zip").base("images")
    with pytest.raises(InputError, match=r"folder .*images does not exist; unpack a\.zip .* set dataset\.root to it$"):
        Layout("toy", tmp_path / "x", archives="a.zip").folder(tmp_path / "x" / "images")


@pytest.mark.parametrize("entry", ["../x.png", "a/../../x.png", "/etc/passwd"])
def test_list_entry_that_leaves_the_root(entry):
    with pytest.raises(InputError, match=r"entry '.*' of l\.txt leaves the data set's folder root"):
        inside(Path("root"), entry, list_file=Path("l.txt"))
    assert inside(Path("root"), "a/x.png", list_file=Path("l.txt")) == Path("root/a/x.png")


def test_lists(tmp_path):
    path, layout = tmp_path / "l.txt", Layout("toy", tmp_path, archives="a.zip")
    with pytest.raises(InputError, match=r"toy lacks its list file .*l\.txt; unpack a\.zip"):
        layout.lines(path)
    path.write_text("\n  \n")
    with pytest.raises(InputError, match=r"l\.txt has no entries, so the split is empty"):
        layout.lines(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"l\.txt is no text in UTF-8 \(byte 0xff at position 0; UTF-16\): save it"):
        layout.lines(path)
    path.write_text("a \r\n\n b\n")
    assert layout.lines(path) == ["a", "b"]
    path.write_bytes("\ufeffä\n".encode())
    assert layout.entries(path, tmp_path) == ["ä"], "no byte order mark in the first name"
    path.write_text("a\na\n")
    with pytest.raises(InputError, match=r"l\.txt names 'a' twice; remove one of the two lines"):
        layout.entries(path, tmp_path)


def test_pairs():
    images = {name: Path(f"{name}.jpg") for name in "xyz"}
    labels = {name: Path(f"{name}.png") for name in "zyx"}
    layout = Layout("toy", ".", archives="a.zip")

    def pair(images, labels):
        return layout.pair(images, labels, image="images/{id}.jpg", label="labels/{id}.png")

    assert [(s.name, s.image, s.labels) for s in pair(images, labels)] == [
        (name, Path(f"{name}.jpg"), (Path(f"{name}.png"),)) for name in "xyz"
    ]
    with pytest.raises(InputError, match=r"image y\.jpg of toy has no label \(labels/y\.png is missing\); unpack"):
        pair(images, {k: v for k, v in labels.items() if k != "y"})
    with pytest.raises(InputError, match=r"image x\.jpg .* and 2 more like it"):
        pair(images, {})
    with pytest.raises(InputError, match=r"label y\.png of toy has no image \(images/y\.jpg is missing\)"):
        pair({k: v for k, v in images.items() if k != "y"}, labels)


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("wanted", "there", "how"),
    [
        ("a.png", "A.PNG", "in upper and lower case only"),
        (f"{NFC}.png", f"{NFD}.png", "in the Unicode form of its letters only"),
        ("a.png", "a.tif", "in its extension only"),
        ("a.png", "a_mask.png", "by '_mask'"),
        ("a.png", "label-a.png", "by 'label-'"),
        ("a_rgb.png", "a.png", "by '_rgb'"),
        ("frame1.png", "frame10.png", None),
        ("a.png", "b.png", None),
        ("a.png", "a.txt", None),
    ],
)
def test_near_misses_are_named(tmp_path, wanted, there, how):
    (tmp_path / there).touch()
    expected = "" if how is None else f", but {tmp_path / there} is there, whose name differs {how}"
    assert near_miss(tmp_path / wanted) == expected


def test_the_nearest_miss_is_named_and_a_folder_of_another_case_is_looked_into(tmp_path):
    (tmp_path / "Day").mkdir()
    for name in ("a-1.png", "A.png"):
        (tmp_path / "Day" / name).touch()
    assert near_miss(tmp_path / "Day") == ", but must be a file and is a folder"
    assert "A.png is there, whose name differs in upper and lower case only" in near_miss(tmp_path / "Day" / "a.png")
    assert "Day/A.png is there, whose name differs in its folder's name" in near_miss(tmp_path / "day" / "A.png")
    assert near_miss(tmp_path / "night" / "a.png") == ""


def test_a_near_miss_stands_in_the_sentence_of_a_pair(tmp_path):
    """A folder whose name holds braces, which are no place for an id."""
    folder = tmp_path / "{x}"
    folder.mkdir()
    (folder / "a_mask.png").touch()
    layout = Layout("toy", tmp_path, archives="a.zip")
    expected = r"has no label \(.*/a\.png is missing, but .*/a_mask\.png is there, whose name differs by '_mask'\)"
    with pytest.raises(InputError, match=expected):
        layout.pair({"a": folder / "a.jpg"}, layout.files(folder, ".png"), image="", label=f"{folder}/{{id}}.png")


def test_hidden_files_are_not_samples(tmp_path):
    for name in ("b.png", "a.png", "._a.png", "c.txt"):
        (tmp_path / name).touch()
    assert list(Layout("toy", tmp_path, archives="a.zip").files(tmp_path, ".png")) == ["a", "b"]


def refuse(monkeypatch, method, path):
    """Make ``method`` of ``path`` fail as it does for a user without permission (the superuser has all)."""
    original = getattr(Path, method)

    def guarded(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, method, guarded)


def test_folder_without_permission(tmp_path, monkeypatch):
    refuse(monkeypatch, "iterdir", tmp_path)
    with pytest.raises(
        InputError, match=rf"folder {tmp_path} of toy may not be read by this user; run `chmod -R u\+rX"
    ):
        Layout("toy", tmp_path, archives="a.zip").folder(tmp_path)


def test_list_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "l.txt"
    path.write_text("a")
    refuse(monkeypatch, "open", path)
    with pytest.raises(InputError, match=r"list file .*l\.txt may not be read by this user; run `chmod -R u\+rX"):
        Layout("toy", tmp_path, archives="a.zip").lines(path)
