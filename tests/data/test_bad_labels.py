"""Labels that ``dataset=folder`` refuses, in every format."""

import pytest
from label_files import changed, configured, drawn, first_shape, make, save, shapes_of

from segkit.check.check import check
from segkit.data import open_dataset
from segkit.errors import InputError


def first_annotation(**changes):
    return changed(lambda content: content["annotations"][0].update(changes))


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
    "outside, at the upper left": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[[-5, -5, -1, -5, -1, -1]]),
        r"lies outside of the image, which has 48x40 pixels: correct or remove it",
    ),
    "no numbers": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[["x", 1, 55, 5, 60, 1]]),
        r"is no list of pos",
    ),
    "numbers in quotes": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[["1", "1", "9", "1", "9", "9"]]),
        r"annotation 0 of .* is no list of positions x, y in pixels",
    ),
    "shares": (
        "coco polygons",
        COCO,
        first_annotation(segmentation=[[0.1, 0.1, 0.9, 0.1, 0.5, 1.0]]),
        r"annotation 0 of .* lies within the first pixel of its image: give positions in pixels, or remove it",
    ),
    "size in quotes": (
        "coco polygons",
        COCO,
        changed(lambda content: content["images"][0].update(width="48")),
        r"is of an image of '48'x40 pixels, but .*a.jpg has 48x40: annotate the image as it is",
    ),
    "three coordinates": (
        "labelme",
        LABELME,
        first_shape(points=[[1, 1, 0], [9, 1, 0], [9, 9, 0], [1, 9, 0]]),
        r"shape 0 of .*a.json is no list of positions x, y in pixels",
    ),
    "crowd": (
        "coco polygons",
        COCO,
        first_annotation(iscrowd="no"),
        r"annotation 0 of .*train.json has iscrowd 'no', but takes 0 or 1: correct it",
    ),
    "a name that is too long": (
        "coco polygons",
        COCO,
        changed(lambda content: content["images"][0].update(file_name="x" * 300 + "/a.jpg")),
        r"names image 'x+/a.jpg', but .*/a.jpg does not exist; add the image",
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
        r"annotation 0 of .*train.json is of category_id \[1\], which is none of its categories: correct or remove it",
    ),
    "image id": (
        "coco polygons",
        COCO,
        first_annotation(image_id=77),
        r"annotation 0 of .* is of image_id 77, which is "
        r"none of its images: correct or remove it, or add what it names to the list",
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
    "YOLO pixels": (
        "yolo",
        YOLO,
        changed(lambda text: "0 0 0 30 0 30 20\n"),
        r"line 1 of .*a.txt has the position 30, but positions are shares of width and height, from 0 to 1: export",
    ),
    "YOLO confidence": (
        "yolo",
        YOLO,
        changed(lambda text: "0 0.1 0.1 0.5 0.1 0.5 0.5 0.93\n"),
        r"line 1 of .*a.txt is no polygon of YOLO, which is a class number and x y x y",
    ),
    "YOLO class": (
        "yolo",
        YOLO,
        changed(lambda text: "9 0 0 1 0 1 1"),
        r"line 1 of .* is of class 9, which classes.yaml does not know; allowed are 0, 1, 255: .* or to ignore",
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
    (tmp_path / "labels" / "train" / "c.json").unlink()
    (tmp_path / "labels" / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match=r"of several formats \(coco: .*train\.json, masks: .*png\): set dataset\.r"):
        open_dataset("folder", root=tmp_path, split="train")
    assert len(open_dataset("folder", root=tmp_path, split="train", format="masks")) == 4


def test_check_says_once_that_all_masks_are_colours(tmp_path, small):
    make(tmp_path, "colours")
    (tmp_path / "classes.yaml").write_text("names: [ground, tool, hand]")
    report = check(configured(small, tmp_path), rehearses=False)
    about = [finding.text for finding in report.findings if "colour images" in finding.text]
    assert len(about) == 2, "once a split"
