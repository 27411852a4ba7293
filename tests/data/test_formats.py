"""Every format of ``dataset=folder`` x (read, count, check, train, evaluate, predict); what is refused; splits by hash.

The true labels are drawn by matplotlib, which shares no code with segkit's rasteriser.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from segkit.check.check import check
from segkit.cli import verb_function
from segkit.config.compose import compose
from segkit.data import open_dataset
from segkit.data.formats.polygons import fill
from segkit.data.statistics import count_labels
from segkit.errors import InputError
from segkit.evaluation.per_image import PerImageCounts
from segkit.run import pipeline
from segkit.run.splits import open_phases, open_split

SIZE = (40, 48)  # height, width
NAMES = ["ground", "tool", "hand"]
COLOURS = np.array([[0, 0, 0], [220, 20, 60], [0, 130, 200]], np.uint8)
SPLITS = {"train": ["a", "b", "c", "d"], "val": ["e", "f"]}


def drawn(shapes, size=SIZE, unlabelled=0):
    """The label of shapes [(class, [ring (n, 2), ...]), ...]: a pixel is of the last polygon with its centre inside."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    label = np.full(size, unlabelled, np.uint8)
    for value, rings in shapes:
        for ring in rings:
            closed = np.concatenate([ring, ring[:1]])
            label[Outline(closed, closed=True).contains_points(centres).reshape(size)] = value
    return label


def shapes_of(name):
    """Some triangles and quadrangles of two classes, which overlap and partly lie outside; without self-crossings."""
    rng = np.random.default_rng(ord(name))
    shapes = []
    for value in (1, 2, 1, 2):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 6)))
        centre, radius = rng.uniform([8, 8], [40, 32]), rng.uniform(5, 14)
        shapes.append((value, [centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)]))
    return shapes


def runs_of(mask):
    """COCO's counts of a mask: lengths of runs of 0 and 1 in turn, column by column."""
    counts, value = [], False
    for pixel in mask.T.ravel().tolist():
        if not counts or pixel != value:
            counts += [0] * (not counts and pixel) + [0]
            value = pixel
        counts[-1] += 1
    return counts


def compressed(counts):
    """COCO's text form of ``counts``, written from its description: six bits a sign, the difference to two before."""
    text = ""
    for place, count in enumerate(counts):
        rest = count - counts[place - 2] if place > 2 else count
        while True:
            low, rest = rest & 31, rest >> 5
            done = rest == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_images(root, place="images/{split}/{name}.jpg", splits=SPLITS):
    for split, names in splits.items():
        for name in names:
            pixels = np.random.default_rng(ord(name)).integers(0, 256, (*SIZE, 3), np.uint8)
            save(root / place.format(split=split, name=name), pixels)


def write_masks(root, encode, end=".png", place="labels/{split}/{name}", **options):
    for split, names in SPLITS.items():
        for name in names:
            save(root / (place.format(split=split, name=name) + end), encode(drawn(shapes_of(name))), **options)


def points(ring):
    return np.asarray(ring).tolist()


def write_coco(root, region):
    for split, names in SPLITS.items():
        images, annotations = [], []
        for number, name in enumerate(names):
            images.append({"id": number, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
            for value, rings in shapes_of(name):
                annotations.append({"image_id": number, "category_id": 10 * value, "segmentation": region(rings)})
        categories = [{"id": 10, "name": "tool"}, {"id": 20, "name": "hand"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def run_length(rings, form=list):
    return {"size": list(SIZE), "counts": form(runs_of(drawn([(1, rings)]) == 1))}


def write_labelme(root, end=".json", place="images/{split}/{name}"):
    for split, names in SPLITS.items():
        for name in names:
            shapes = [
                {"label": NAMES[value], "points": points(rings[0]), "shape_type": "polygon"}
                for value, rings in shapes_of(name)
            ]
            content = {"shapes": shapes, "imageHeight": SIZE[0], "imageWidth": SIZE[1], "imagePath": f"{name}.jpg"}
            (root / (place.format(split=split, name=name) + end)).write_text(json.dumps(content))


def write_yolo(root):
    for split, names in SPLITS.items():
        (root / "labels" / split).mkdir(parents=True)
        for name in names:
            lines = [
                f"{value - 1} " + " ".join(f"{x:.17g}" for x in (rings[0] / SIZE[::-1]).ravel())
                for value, rings in shapes_of(name)
            ]
            (root / "labels" / split / f"{name}.txt").write_text("\n".join(lines) + "\n")
        (root / "labels" / "classes.txt").write_text("tool\nhand\n")


def flat(rings):
    return [np.asarray(ring).ravel().tolist() for ring in rings]


def raw(values):
    return lambda label: np.array(values)[label]


GREY = raw([0, 10, 20])
IDS, POLYGONS = "ids: [0, 10, 20]", "unlabelled: ground"
RGB = f"colours: {COLOURS.tolist()}"
BESIDE = ["images=.", "labels=.", "label_suffix=_mask"]
FORMATS = {
    "png": (IDS, [], lambda root: write_masks(root, lambda label: GREY(label).astype(np.uint8))),
    "tif": (IDS, [], lambda root: write_masks(root, lambda label: GREY(label).astype(np.uint8), ".tif")),
    "bmp": (IDS, [], lambda root: write_masks(root, lambda label: GREY(label).astype(np.uint8), ".bmp")),
    "webp": (
        IDS,
        [],
        lambda root: write_masks(root, lambda label: GREY(label).astype(np.uint8), ".webp", lossless=True),
    ),
    "16 bits": (
        "ids: [0, 700, 60001]",
        [],
        lambda root: write_masks(root, lambda label: raw([0, 700, 60001])(label).astype(np.uint16)),
    ),
    "0 and 255": (
        "ids: [0, 255, 128]\nignore: []",
        [],
        lambda root: write_masks(root, lambda label: raw([0, 255, 128])(label).astype(np.uint8)),
    ),
    "colours": (RGB, [], lambda root: write_masks(root, lambda label: COLOURS[label])),
    "colours webp": (RGB, [], lambda root: write_masks(root, lambda label: COLOURS[label], ".webp", lossless=True)),
    "one folder": (
        "",
        BESIDE,
        lambda root: write_masks(root, lambda label: label, "_mask.png", place="{split}/{name}"),
    ),
    "coco polygons": (POLYGONS, [], lambda root: write_coco(root, flat)),
    "coco rle": (POLYGONS, [], lambda root: write_coco(root, run_length)),
    "coco rle text": (POLYGONS, [], lambda root: write_coco(root, lambda rings: run_length(rings, compressed))),
    "labelme": (POLYGONS, ["labels=images"], write_labelme),
    "yolo": (POLYGONS, [], write_yolo),
}
"""Format: lines of classes.yaml, options of the reader, and the function that writes the labels."""


def make(root, name):
    """Write the images and labels of one format; return the overrides that open them."""
    lines, options, write = FORMATS[name]
    write_images(root, "{split}/{name}.jpg" if "images=." in options else "images/{split}/{name}.jpg")
    write(root)
    (root / "classes.yaml").write_text(f"names: {json.dumps(NAMES)}\n{lines}\n")
    return dict(option.split("=") for option in options)


SMALL = [
    "dataset=folder", "model=coplenet", "model.feature_channels=[4,8,16,32,64]", "model.num_groups=2", "workers=0",
    "dataset.crop=[32,32]", "batch_size=2", "limit_steps=1", "loss=cross_entropy", "device=cpu",
    "evaluation.pictures=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return compose(SMALL)


def configured(config, root, **options):
    dataset = replace(config.dataset, root=str(root), reader=config.dataset.reader | options)
    return replace(config, dataset=dataset, cache_dir=str(root / "cache"))


def pixels(letters):
    """Pixels of each class in the true labels of these images."""
    return sum(np.bincount(drawn(shapes_of(letter)).ravel(), minlength=3) for letter in letters).tolist()


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
            r"data\.yaml names no folder of split 'train' that .*, but {'val': 'images/val'}: write `train: im",
        ),
        (
            "train: images/nowhere\n" + LIST,
            r"names no folder of split 'train' that is below .*, but {'train': 'images/nowhere'}",
        ),
        ("train: images/train\nnc: 2", r"data\.yaml has no names of classes: write `names: \[tool, hand\]`"),
        ("train: images/train\nnames: {1: tool, 2: hand}", r"has no names of classes"),
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


def changed(write):
    """A function of the root that changes a JSON or text file of it: ``write`` takes and gives its content."""

    def change(root, pattern):
        file = next(iter(sorted(root.rglob(pattern))))
        if file.suffix != ".json":
            file.write_text(write(file.read_text()))
            return
        content = json.loads(file.read_text())
        file.write_text(json.dumps(write(content) or content))

    return change


def first_annotation(**changes):
    return changed(lambda content: content["annotations"][0].update(changes))


def first_shape(**changes):
    return changed(lambda content: content["shapes"][0].update(changes))


COCO, LABELME, YOLO = "instances_train.json", "a.json", "a.txt"
BAD = {
    "two points": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[[1, 1, 5, 5]]),
        r"annotation 0 of .*train.json "
        r"\(image 'a.jpg'\) has 2 points, but a polygon has three or more: correct or remove it",
    ),
    "outside": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[[50, 1, 55, 5, 60, 1]]),
        r"lies outside of the image, which has 48x40 pixels: correct or remove it",
    ),
    "no numbers": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[["x", 1, 55, 5, 60, 1]]),
        r"is no list of pos",
    ),
    "image id twice": (
        "coco polygons",
        COCO,
        changed(lambda content: {**content, "images": [{**entry, "id": 0} for entry in content["images"]]}),
        r"instances_train.json gives the image id 0 twice, as files do that were merged: number them anew",
    ),
    "category id twice": (
        "coco polygons",
        COCO,
        changed(lambda content: content["categories"].append({"id": content["categories"][0]["id"], "name": "sky"})),
        r"instances_train.json gives the category id \d+ twice, as files do that were merged",
    ),
    "not finite": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[[float("nan"), 1, 5, 5, 6, 1]]),
        r"is no list",
    ),
    "category": (
        "coco polygons",
        COCO,
        changed(lambda content: content["categories"][0].update(name="cat")),
        r"has annotations of 'cat', which classes.yaml does not know; allowed are ground, tool, hand: correct them, or",
    ),
    "no category": (
        "coco polygons",
        COCO,
        first_annotation(category_id=[1]),
        r"has annotations of None, which classes.yaml",
    ),
    "image id": (
        "coco polygons",
        COCO,
        first_annotation(image_id=77),
        r"annotation 0 of .* is of image_id 77, which is "
        r"none of its images: remove it, or add the image to the list",
    ),
    "image": (
        "coco polygons",
        COCO,
        changed(lambda content: content["images"][0].update(file_name="z.jpg")),
        r"names image 'z.jpg', but .*z.jpg does not exist; add the image, or mend dataset.reader.images",
    ),
    "path": (
        "coco polygons",
        COCO,
        changed(lambda content: content["images"][0].update(file_name="../z.jpg")),
        r"entry '../z.jpg' of .* leaves the data set's folder",
    ),
    "image twice": (
        "coco polygons",
        COCO,
        changed(lambda content: content["images"].append(content["images"][0])),
        r"has the image 'a.jpg' twice",
    ),
    "box": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[], bbox=[1, 2, 3, 4]),
        r"has no segmentation, a box al",
    ),
    "image size": (
        "coco polygons",
        COCO,
        changed(lambda content: content["images"][0].update(width=96)),
        r"is of an image of 96x40 pixels, but .*a.jpg has 48x40: annotate the image as it is, or put",
    ),
    "mask size": (
        "coco rle",
        COCO,
        first_annotation(segmentation={"size": [48, 40], "counts": [1920]}),
        r"is a mask of size \[48, 40\], but its image has \[height, width\] \[40, 48\]: annotate",
    ),
    "mask sum": (
        "coco rle",
        COCO,
        first_annotation(segmentation={"size": [40, 48], "counts": [1919]}),
        r"has counts that are no mask of \[40, 48\]: export it again",
    ),
    "mask text": (
        "coco rle",
        COCO,
        first_annotation(segmentation={"size": [40, 48], "counts": "PP`"}),
        r"has counts that are no mask of \[40, 48\]",
    ),
    "a number without an end": (
        "coco rle",
        COCO,
        first_annotation(segmentation={"size": [40, 48], "counts": "o" * 10_000}),
        r"has counts that are no mask of \[40, 48\]",
    ),
    "huge mask": (
        "coco rle",
        COCO,
        first_annotation(segmentation={"size": [40, 48], "counts": [2**70, -(2**70)]}),
        r"has counts that are no mask of \[40, 48\]",
    ),
    "other JSON": (
        "coco polygons",
        COCO,
        changed(lambda content: {"hello": []}),
        r"is no annotation file of COCO \(its list 'images' is missing\): put the right file there",
    ),
    "list of JSON": ("coco polygons", COCO, changed(lambda content: [1]), r"is no annotation file of COCO"),
    "Labelme JSON": (
        "labelme",
        LABELME,
        changed(lambda content: {"shapes": [3]}),
        r"is no annotation file of Labelme \("
        r"its lists do not hold mappings\)",
    ),
    "circle": (
        "labelme",
        LABELME,
        first_shape(shape_type="circle"),
        r"shape 0 of .*a.json is of type 'circle', but "
        r"polygons and rectangles are read: draw it as a polygon",
    ),
    "label": ("labelme", LABELME, first_shape(label="cat"), r"shape 0 of .*a.json is of class 'cat', which"),
    "Labelme size": (
        "labelme",
        LABELME,
        changed(lambda content: content.update(imageHeight=80)),
        r"is of an image of 48x80 pixels, but",
    ),
    "YOLO box": (
        "yolo",
        YOLO,
        changed(lambda text: "0 0.5 0.5 0.1 0.1\n"),
        r"line 1 of .*a.txt is a box, but polygons",
    ),
    "YOLO word": (
        "yolo",
        YOLO,
        changed(lambda text: text + "x 0 0 1 1 0 1\n"),
        r"line 5 of .*a.txt is no polygon of YO",
    ),
    "YOLO class": (
        "yolo",
        YOLO,
        changed(lambda text: "9 0 0 1 0 1 1"),
        r"line 1 of .* is of class 9, .*allowed are 0, 1",
    ),
    "unlabelled": (
        "yolo",
        "classes.yaml",
        changed(lambda text: "names: [ground, tool, hand]"),
        r"does not say what the pixels are that no polygon covers: add `unlabelled: ground`, the name of a cl",
    ),
    "unlabelled name": (
        "yolo",
        "classes.yaml",
        changed(lambda text: text.replace("d: ground", "d: sky")),
        r"has unlabelled: 'sky', but one of its names is wanted, or void",
    ),
    "colours": (
        "colours",
        "classes.yaml",
        changed(lambda text: "names: [ground, tool, hand]"),
        r"the labels are colour images \(.*a.png, mode RGB\), but .*classes.yaml does not say which colour is",
    ),
    "colour": (
        "colours",
        "classes.yaml",
        changed(lambda text: text.replace("220", "221")),
        r"a.png has colours that classes.yaml does not know: \[220, 20, 60\] \(\d+ pixels\); add them to colours",
    ),
    "colour twice": (
        "colours",
        "classes.yaml",
        changed(lambda text: text + "ignore: [[0, 0, 0]]\n"),
        r"uses colour \(0, 0, 0\) twice among colours and ignore; each colour has one meaning",
    ),
}
"""Fault: format, file that is changed, how, and the sentence."""


@pytest.mark.parametrize("fault", BAD)
def test_bad_labels_are_named(tmp_path, fault):
    name, pattern, change, message = BAD[fault]
    options = make(tmp_path, name)
    change(tmp_path, pattern)
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root=tmp_path, split="train", **options)[0]


def test_masks_of_two_kinds_and_labels_of_two_formats_are_named(tmp_path):
    make(tmp_path, "colours")
    save(tmp_path / "labels" / "train" / "b.png", drawn(shapes_of("b")))
    data = open_dataset("folder", root=tmp_path, split="train")
    with pytest.raises(InputError, match=r"b.png is an index mask \(mode L\), but others of its folder are colour im"):
        data.label(1)
    (tmp_path / "labels" / "train" / "c.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"of several formats \(masks: .*, labelme: .*c.json\): set dataset.reader.format=masks or th"
    ):
        open_dataset("folder", root=tmp_path, split="train")
    assert len(open_dataset("folder", root=tmp_path, split="train", format="masks")) == 4


def test_check_says_once_that_all_masks_are_colours(tmp_path, small):
    make(tmp_path, "colours")
    (tmp_path / "classes.yaml").write_text("names: [ground, tool, hand]")
    report = check(configured(small, tmp_path), rehearses=False)
    about = [finding.text for finding in report.findings if "colour images" in finding.text]
    assert len(about) == 2, "once a split"


@pytest.fixture
def frames(tmp_path):
    """60 frames of 20 videos in one folder, with masks beside them."""
    for number in range(60):
        place = tmp_path / "photos" / f"video_{number // 3}_{number % 3}"
        save(place.with_suffix(".png"), np.full((8, 8, 3), number, np.uint8))
        save(place.with_name(place.name + "_mask.png"), np.full((8, 8), number == 0, np.uint8))
    (tmp_path / "classes.yaml").write_text("names: [ground, tool]")
    return tmp_path


FOLDERS = {"images": "photos", "labels": "photos", "label_suffix": "_mask"}


def names_of(root, split, **options):
    return {sample.name for sample in open_dataset("folder", root=root, split=split, **FOLDERS, **options).samples}


def test_a_share_of_the_images_is_val_in_the_order_of_their_hashes(frames):
    train, val = (names_of(frames, split, val_fraction=0.3) for split in ("train", "val"))
    assert (len(train) + len(val), train & val) == (60, set())
    digests = {hashlib.blake2b(name.encode(), digest_size=8, salt=b"val").hexdigest(): name for name in train | val}
    assert val == {digests[digest] for digest in sorted(digests)[:18]}, "0.3 of 60 in the order of their hashes"
    (frames / "photos" / "video_0_0.png").unlink()
    (frames / "photos" / "video_0_0_mask.png").unlink()
    assert len(names_of(frames, "val", val_fraction=0.3) - val) <= 1, "the others stay where they are"
    few = {f"video_{number}_{frame}" for number in range(3, 7) for frame in range(3)}
    for path in (frames / "photos").iterdir():
        if path.stem.removesuffix("_mask") not in few:
            path.unlink()
    for share, num in ((0.1, 1), (0.3, 4), (0.5, 6), (0.9, 11)):
        assert len(names_of(frames, "val", val_fraction=share)) == num, "of 12 images, close to the share"
    assert len(names_of(frames, "val", val_fraction=0.3, groups="{group}_*")) == 3, "one of four groups"


def test_folds_are_equal_parts_and_groups_stay_together(frames):
    parts = [names_of(frames, "val", folds=5, fold=fold, groups="{group}_*") for fold in range(5)]
    assert [len(part) for part in parts] == [12] * 5
    assert set().union(*parts) == names_of(frames, "train", folds=5, groups="{group}_*") | parts[0]
    for part in parts:
        videos = {name.rpartition("_")[0] for name in part}
        assert all(f"{video}_{frame}" in part for video in videos for frame in range(3))


def test_the_held_out_images_are_independent_of_val_and_keep_groups(frames, small):
    config = configured(small, frames, **FOLDERS, val_fraction=0.3, groups="{group}_*")
    dataset = replace(config.dataset, holdout=0.3)
    train, held, val = (
        {sample.name.rpartition("_")[0] for sample in open_split(dataset, split).samples}
        for split in ("train", "holdout", "val")
    )
    assert min(map(len, (train, held, val))) > 0
    assert (train & held, train & val, held & val) == (set(), set(), set())


def test_check_says_which_class_a_fold_lacks(frames, small):
    report = check(configured(small, frames, **FOLDERS, folds=20, groups="{group}_*"), rehearses=False)
    assert any("has no pixel of tool" in finding.text for finding in report.findings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.2}, r"val_fraction is 1.2, but is a share of the images from 0 to 1: set dataset.reader"),
        ({"val_fraction": 0.0001}, r"val_fraction=0.0001 puts none of 60 images \(60 groups\) into val: set"),
        (
            {"folds": 5, "fold": 5},
            r"has folds=5, fold=5 and val_fraction=0.0, but takes two folds or more, a fold from",
        ),
        (
            {"folds": 5, "val_fraction": 0.1},
            r"and no val_fraction then: set dataset.reader.folds=5 dataset.reader.fold=0",
        ),
        ({"folds": 5, "groups": "x"}, r"groups is 'x', but must have \{group\} once, and \* at most twice: set"),
        ({"folds": 5, "groups": "{group}/*"}, r"image 'video_0_0' does not fit dataset.reader.groups='\{group\}/\*'"),
        (
            {},
            r"split 'train' of .* does not exist: .* set dataset.reader.val_fraction=0.2 to cut val out of all images",
        ),
    ],
)
def test_bad_cuts_are_refused(frames, options, message):
    with pytest.raises(InputError, match=message):
        names_of(frames, "train", **options)


def test_a_rectangle_of_labelme_is_a_polygon(tmp_path):
    options = make(tmp_path, "labelme")
    first_shape(label="hand", shape_type="rectangle", points=[[3, 4], [1, 9]])(tmp_path, "a.json")
    changed(lambda content: content.update(shapes=content["shapes"][:1]))(tmp_path, "a.json")
    label = open_dataset("folder", root=tmp_path, split="train", **options)[0].label
    assert (label == 2).sum() == (label[4:9, 1:3] == 2).sum() == 10
    first_shape(points=[[3], 4])(tmp_path, "a.json")
    with pytest.raises(InputError, match=r"shape 0 of .* is a rectangle without two corners: correct or remove it"):
        open_dataset("folder", root=tmp_path, split="train", **options).label(0)


def test_polygons_of_one_class_in_void_are_counted(tmp_path):
    """Void beside one class is suspicious in masks alone, where 255 may be a class."""
    options = make(tmp_path, "labelme")
    (tmp_path / "classes.yaml").write_text("names: [tool, other]\nunlabelled: void\nignore: [hand]\n")
    counts = count_labels(open_dataset("folder", root=tmp_path, split="train", **options), workers=0)
    assert counts.class_pixels.tolist() == [pixels(SPLITS["train"])[1], 0]


def test_a_val_split_that_is_there_is_not_cut_again(tmp_path):
    make(tmp_path, "png")
    with pytest.raises(InputError, match=r"has a split val already, but val_fraction or folds would cut another one"):
        open_dataset("folder", root=tmp_path, split="train", val_fraction=0.5)
