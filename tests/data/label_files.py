"""Images with labels in every format of ``dataset=folder``, and their true labels.

The true labels are drawn by matplotlib, which shares no code with segkit's rasteriser.
"""

import json
from dataclasses import replace

import numpy as np
from matplotlib.path import Path as Outline
from PIL import Image

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


def configured(config, root, **options):
    dataset = replace(config.dataset, root=str(root), reader=config.dataset.reader | options)
    return replace(config, dataset=dataset, cache_dir=str(root / "cache"))


def pixels(letters):
    """Pixels of each class in the true labels of these images."""
    return sum(np.bincount(drawn(shapes_of(letter)).ravel(), minlength=3) for letter in letters).tolist()


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


def first_shape(**changes):
    return changed(lambda content: content["shapes"][0].update(changes))
