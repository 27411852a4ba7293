"""Every format of ``dataset=folder`` x (read, count, check, train, evaluate, predict), and what the formats mean."""

import json
import shutil

import numpy as np
import pytest
from label_files import (
    FORMATS,
    SIZE,
    SPLITS,
    changed,
    configured,
    drawn,
    first_shape,
    make,
    pixels,
    save,
    shapes_of,
    write_images,
    write_yolo,
)
from PIL import Image
from PIL.ExifTags import Base

from segkit.check.check import check
from segkit.cli import verb_function
from segkit.data import open_dataset
from segkit.data.formats.polygons import fill
from segkit.data.statistics import count_labels
from segkit.errors import InputError
from segkit.evaluation.per_image import PerImageCounts
from segkit.run import pipeline
from segkit.run.splits import open_phases

ORIENTATION = Base.Orientation


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_goes_all_the_way(tmp_path, name, small, capsys):
    """Check, counts, training, evaluation and prediction see one label, which is the true one."""
    root, run, out = tmp_path / "own", tmp_path / "run", tmp_path / "out"
    config = configured(small, root, **make(root, name))
    splits = open_phases(config)["train"]
    for item in [*splits.train, *splits.val]:
        letter = item.name.rpartition("/")[2]
        np.testing.assert_array_equal(item.label, drawn(shapes_of(letter)))
    report = check(config, rehearses=False)
    assert [finding.text for finding in report.findings if finding.level == "error"] == []
    assert report.data[0].train.class_pixels.tolist() == pixels(SPLITS["train"])
    pipeline.run(config, run, {"train": splits})
    counts = json.loads((run / "label_counts.json").read_text())["classes"]
    assert [row["pixels"] for row in counts.values()] == pixels(SPLITS["train"])
    verb_function("evaluate")([str(run), "--workers", "0", "--device", "cpu"])
    (matrices,) = (run / "evaluations").glob("*.npz")
    assert PerImageCounts.load(matrices).total().sum(1).tolist() == pixels(SPLITS["val"])
    with pytest.raises(SystemExit, match=r"^0$"):
        verb_function("predict")([str(run), "--input", str(splits.val.samples[0].image), "--output", str(out)])
    assert "written: 1 predictions" in capsys.readouterr().out


@pytest.mark.parametrize("most", [2**22, 7])
def test_polygons_fill_the_pixels_whose_centres_they_hold(most, monkeypatch):
    """Also those that cross themselves, lie partly outside, or are as narrow as a needle."""
    monkeypatch.setattr("segkit.data.formats.polygons.MOST_CROSSINGS", most)
    rng = np.random.default_rng(0)
    for size in [(1, 1), (7, 5), (40, 60)]:
        for _ in range(60):
            ring = rng.uniform(-0.4, 1.4, (rng.integers(3, 9), 2)) * size[::-1]
            found = np.full(size, 7, np.uint8)
            fill(found, ring, 3)
            np.testing.assert_array_equal(found, drawn([(3, [ring])], size, unlabelled=7))
    square = np.array([[1, 1], [4, 1], [4, 3], [1, 3]], float)
    single, both = np.zeros((2, 5, 9), np.uint8)
    fill(single, square, 1)
    assert (single == 1).sum() == 3 * 2
    shifted = square + 0.5  # its edges run through centres: two that touch share none and leave none out
    fill(both, shifted, 1)
    fill(both, shifted + np.array([3, 0]), 2)
    assert [(both == value).sum() for value in (1, 2)] == [6, 6]


def test_later_shapes_lie_over_earlier_ones_and_crowds_are_what_the_classes_say(tmp_path):
    make(tmp_path, "coco polygons")
    file = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    square = [[0, 0, 20, 0, 20, 20, 0, 20]]
    content["annotations"] = [
        {"image_id": 0, "category_id": 20, "segmentation": square},
        {"image_id": 0, "category_id": 10, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10], [30, 0, 40, 0, 40, 9]]},
        {"image_id": 1, "category_id": 10, "segmentation": square, "iscrowd": 1},
    ]
    file.write_text(json.dumps(content))
    first, second = open_dataset("folder", root=tmp_path, split="val")
    assert (first.label[5, 5], first.label[15, 15], first.label[2, 39], first.label[30, 30]) == (1, 2, 1, 0)
    assert (second.label[5, 5], second.label[30, 30]) == (255, 0)
    (tmp_path / "classes.yaml").write_text("names: [ground, tool, hand]\nunlabelled: void\ncrowd: hand\n")
    second = open_dataset("folder", root=tmp_path, split="val")[1]
    assert (second.label[5, 5], second.label[30, 30]) == (2, 255)
    (tmp_path / "classes.yaml").write_text("names: [ground, hand]\nunlabelled: ground\nignore: [tool]\n")
    assert open_dataset("folder", root=tmp_path, split="val")[0].label[5, 5] == 255


def test_what_cvat_exports_is_cut_into_splits(tmp_path):
    make(tmp_path, "coco polygons")
    expected = list(open_dataset("folder", root=tmp_path, split="train"))
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "default")
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations" / "instances_default.json")
    shutil.rmtree(tmp_path / "images" / "val")
    (tmp_path / "annotations" / "instances_val.json").unlink()
    splits = [open_dataset("folder", root=tmp_path, split=split, val_fraction=0.5) for split in ("train", "val")]
    found = {item.name: item.label for split in splits for item in split}
    assert [len(split) for split in splits] == [2, 2]
    for item in expected:
        np.testing.assert_array_equal(found[item.name], item.label)
    (tmp_path / "annotations" / "instances_default.json").unlink()
    with pytest.raises(InputError, match=r"^/.* has no annotation file of COCO: put it at .*/labels\.json"):
        open_dataset("folder", root=tmp_path, split="train", val_fraction=0.5, format="coco")


LIST, MAPPING = "names: [tool, hand]", "names:\n  0: tool\n  1: hand"
PLACES = {
    "plain": ("images/{split}", "train: images/train\nval: images/val\ntest:\n"),
    "below path": ("set/images/{split}", "path: set\ntrain: images/train\nval: ./images/val\n"),
    "splits first": ("{split}/images", "train: ../train/images\nval: ../val/images\nnc: 2\nroboflow: {license: x}\n"),
    "path of another machine": ("images/{split}", "path: /content/mine\ntrain: images/train\nval: images/val\n"),
}


@pytest.mark.parametrize("names", [LIST, MAPPING])
@pytest.mark.parametrize("layout", PLACES)
def test_the_data_yaml_of_yolo_names_classes_and_folders(tmp_path, names, layout):
    """Nothing else is needed; pixels without a polygon are background."""
    place, text = PLACES[layout]
    write_yolo(tmp_path / "drawn")
    (tmp_path / "own").mkdir()
    for split, letters in SPLITS.items():
        images = tmp_path / "own" / place.format(split=split)
        labels = tmp_path / "own" / place.format(split=split).replace("images", "labels")
        labels.mkdir(parents=True)
        for letter in letters:
            save(images / f"{letter}.jpg", np.zeros((*SIZE, 3), np.uint8))
            (labels / f"{letter}.txt").write_bytes((tmp_path / f"drawn/labels/{split}/{letter}.txt").read_bytes())
    (tmp_path / "own" / "data.yaml").write_text(text + names + "\n")
    for split, letters in SPLITS.items():
        data = open_dataset("folder", root=tmp_path / "own", split=split)
        assert data.classes == ("background", "tool", "hand")
        assert [item.name for item in data] == letters
        for item in data:
            np.testing.assert_array_equal(item.label, drawn(shapes_of(item.name)))
    if layout == "plain":
        with pytest.raises(InputError, match=r"mine\.yaml does not exist"):  # not in silence by what is there
            open_dataset("folder", root=tmp_path / "own", split="val", classes="mine.yaml")
        (tmp_path / "own" / "labels" / "val" / "e.txt").unlink()
        with pytest.raises(InputError, match=r"e\.jpg of folder has no label .*again, write an empty file where no"):
            open_dataset("folder", root=tmp_path / "own", split="val")
        (tmp_path / "own" / "labels" / "val" / "e.txt").touch()
        assert not open_dataset("folder", root=tmp_path / "own", split="val").label(0).any()
        (tmp_path / "own" / "data.yaml").write_text(text.replace("val:", "#") + "names: [hand, background, tool]\n")
        parts = [
            open_dataset("folder", root=tmp_path / "own", split=split, val_fraction=0.25) for split in ("train", "val")
        ]
        assert [len(part) for part in parts] == [3, 1]
        label = parts[0][0].label
        np.testing.assert_array_equal(label, np.array([1, 0, 1])[drawn(shapes_of(parts[0][0].name))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: /etc\n" + LIST, r"entry '/etc' of .*data\.yaml leaves the data set's folder"),
        ("train: ../../images\n" + LIST, r"entry '\.\./images' of .*data\.yaml leaves the data set's folder"),
        (
            "train: [images/train, more]\n" + LIST,
            r"has train: .*, but one folder of images is wanted: write `images/train`",
        ),
        ("train: train.txt\n" + LIST, r"has train: 'train\.txt', but one folder of images is wanted"),
        (
            "val: images/val\n" + LIST,
            r"data\.yaml names no folder of split 'train' that .*, but {'val': 'images/val'}: write `train: im.* it$",
        ),
        (
            "train: images/nowhere\n" + LIST,
            r"names no folder of split 'train' that is below .*, but {'train': 'images/nowhere'}",
        ),
        ("train: images/train\nnc: 3\n" + LIST, r"data\.yaml has nc: 3, but 2 names: correct one of the two"),
        (f"train: {'x' * 300}/a\n" + LIST, r"names no folder of split 'train' that is below"),
        ("train: images/train\nnames: {0: tool, 1: ''}", r"has the name '', which is no text"),
        ("train: images/train\nnc: 2", r"data\.yaml has no names .*: write `names: \[tool, hand\]`, or `0"),
        ("train: images/train\nnames: {1: tool, 2: hand}", r"no names of classes that are numbered 0, 1, 2"),
        ("train: images/train\nnames: {0: [tool], 1: hand}", r"has no names of classes"),
        ("train: images/train\nnames: [tool, no]", r"has the class name no, which YAML reads as bool and not as text"),
        ("train: images/train\nnames: [tool, tool]", r"names a class twice: tool"),
        ("train: &a images/train\nnames: *a", r"data\.yaml uses references or tags of YAML in line 1"),
        ("train: !!python/object/apply:os.system [ls]", r"data\.yaml uses references or tags of YAML in line 1"),
        ("train: ${oc.env:HOME}\n" + LIST, r"data\.yaml has '\$\{' in line 1"),
        ("train: [\n" + LIST, r"data\.yaml is no valid YAML"),
        ("{" * 2000, r"data\.yaml is nested more than"),
    ],
)
def test_a_damaged_or_hostile_data_yaml_is_one_sentence(tmp_path, text, message):
    write_images(tmp_path)
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root=tmp_path, split="train")


def test_a_rectangle_of_labelme_is_a_polygon(tmp_path):
    options = make(tmp_path, "labelme")
    first_shape(label="hand", shape_type="rectangle", points=[[3, 4], [1, 9]])(tmp_path, "a.json")
    changed(lambda content: content.update(shapes=content["shapes"][:1]))(tmp_path, "a.json")
    label = open_dataset("folder", root=tmp_path, split="train", **options)[0].label
    assert (label == 2).sum() == (label[4:9, 1:3] == 2).sum() == 10
    first_shape(points=[[3], 4])(tmp_path, "a.json")
    with pytest.raises(InputError, match=r"shape 0 of .* is a rectangle without two corners: correct or remove it"):
        open_dataset("folder", root=tmp_path, split="train", **options).label(0)


def test_ids_of_coco_may_be_text_or_such_floats_as_tables_make_of_them(tmp_path):
    """Of the images, of the categories, and of either in an annotation."""
    make(tmp_path, "coco polygons")

    def change(content):
        for entry in content["images"]:
            entry["id"] = str(entry["id"])
        for entry in content["annotations"]:
            entry.update(image_id=str(entry["image_id"]), category_id=float(entry["category_id"]))

    changed(change)(tmp_path, "instances_train.json")
    for item in open_dataset("folder", root=tmp_path, split="train"):
        np.testing.assert_array_equal(item.label, drawn(shapes_of(item.name)))


@pytest.mark.parametrize(
    ("name", "size", "tag", "is_read"),
    [
        ("labelme", SIZE, 1, True),
        ("labelme", SIZE, 3, False),
        ("labelme", SIZE, 6, True),  # the file says that it is of the stored pixels
        ("labelme", SIZE[::-1], 6, False),
        ("labelme", (44, 44), 8, False),
        ("yolo", SIZE, 8, False),
    ],
)
def test_polygons_of_images_that_are_shown_turned_are_refused(tmp_path, name, size, tag, is_read):
    """Programs that draw polygons turn photos by their tag, so that the polygons lie elsewhere in the stored pixels."""
    options = make(tmp_path, name)
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    stored = size if tag == 8 else SIZE
    save(tmp_path / "images" / "train" / "a.jpg", np.zeros((*stored, 3), np.uint8), exif=exif)
    if name == "labelme":
        changed(lambda content: content.update(imageHeight=size[0], imageWidth=size[1]))(tmp_path, "a.json")
    data = open_dataset("folder", root=tmp_path, split="train", **options)
    if is_read:
        assert data.label(0).any()
        return
    with pytest.raises(InputError, match=r"a\.jpg has an orientation tag, so the polygons of .* turn its pixels and"):
        data.label(0)


def test_polygons_of_one_class_in_void_are_counted(tmp_path):
    """Void beside one class is suspicious in masks alone, where 255 may be a class."""
    options = make(tmp_path, "labelme")
    (tmp_path / "classes.yaml").write_text("names: [tool, other]\nunlabelled: void\nignore: [hand]\n")
    counts = count_labels(open_dataset("folder", root=tmp_path, split="train", **options), workers=0)
    assert counts.class_pixels.tolist() == [pixels(SPLITS["train"])[1], 0]


def test_a_number_of_yolo_that_is_ignored_is_void(tmp_path):
    make(tmp_path, "yolo")
    (tmp_path / "labels" / "train" / "a.txt").write_text("7 0 0 0.5 0 0.5 0.5\n")
    with (tmp_path / "classes.yaml").open("a") as file:
        file.write("ignore: [7]\n")
    assert np.unique(open_dataset("folder", root=tmp_path, split="train").label(0)).tolist() == [0, 255]
    (tmp_path / "classes.yaml").unlink()
    (tmp_path / "data.yaml").write_text(f"train: images/train\n{LIST}\n")
    with pytest.raises(InputError, match=r"has images=images and labels=masks, but .*data\.yaml names the folders"):
        open_dataset("folder", root=tmp_path, split="train", labels="masks")
    with pytest.raises(InputError, match=r"7, which data.yaml does not know; allowed are 0, 1: .* or add it to names$"):
        open_dataset("folder", root=tmp_path, split="train").label(0)
