"""A folder of one's own: classes.yaml, splits by sub-folders and by lists, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.data.readers.folder import default_palette, read_classes
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample


@pytest.fixture
def root(tmp_path):
    return make_sample("folder", tmp_path / "own", num_images=3)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


@pytest.fixture
def listed(tmp_path):
    """Images in nested folders, with list files in place of sub-folders for the splits."""
    root = tmp_path / "listed"
    for name in ("day/a.jpg", "day/b.PNG", "night/a.tif", "c.jpeg"):
        write(root / "images" / name, np.zeros((4, 5, 3)))
        write((root / "labels" / name).with_suffix(".png"), np.full((4, 5), 1))
    (root / "classes.yaml").write_text("names: [background, tool]\n")
    (root / "train.txt").write_text("day/a.jpg\nnight/a\n\n")
    (root / "val.txt").write_text("c.jpeg\n")
    return root


def test_sub_folders_are_splits_and_ids_map_to_classes(root):
    data = open_dataset("folder", root=root, split="train")
    assert data.classes == ("ground", "plant", "stone", "tool")
    assert data.palette[3].tolist() == [220, 60, 40]
    to_train = {0: 255, 1: 0, 2: 1, 5: 2, 9: 3}
    assert len(data) == 3
    for item in data:
        raw = np.array(Image.open(root / "labels" / "train" / f"{item.name}.png"))
        np.testing.assert_array_equal(item.label, np.vectorize(to_train.get)(raw))
    assert len(open_dataset("folder", root=root, split="val")) == 2


def test_list_files_are_splits(listed):
    data = open_dataset("folder", root=listed, split="train")
    assert [sample.name for sample in data.samples] == ["day/a", "night/a"]
    assert (data[1].label == 1).all()
    assert len(open_dataset("folder", root=listed, split="val")) == 1


def test_a_test_split_may_have_no_labels(root):
    write(root / "images" / "test" / "x.png", np.zeros((4, 4, 3)))
    assert not open_dataset("folder", root=root, split="test").labelled
    write(root / "images" / "train2" / "x.png", np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match=r"split 'train2' of .* has images but no labels: folder .*train2 does not"):
        open_dataset("folder", root=root, split="train2")


def test_pairs_must_be_complete(root):
    (root / "labels" / "train" / "0001.png").rename(root / "labels" / "train" / "0009.png")
    with pytest.raises(InputError, match=r"0001.jpg of folder has no label"):
        open_dataset("folder", root=root, split="train")
    (root / "images" / "train" / "0001.jpg").unlink()
    with pytest.raises(InputError, match=r"label .*0009.png of folder has no image"):
        open_dataset("folder", root=root, split="train")


def test_an_unknown_split_names_those_that_are_there(root, listed):
    with pytest.raises(
        InputError, match=r"split 'valid' of .* does not exist: .*set dataset.train_split .*to train, val"
    ):
        open_dataset("folder", root=root, split="valid")
    with pytest.raises(InputError, match=r"to day, night, train, val$"):
        open_dataset("folder", root=listed, split="test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../secret.jpg", r"entry '../secret.jpg' of .*train.txt leaves the data set's folder"),
        ("/etc/hosts", r"leaves the data set's folder"),
        ("day/a.jpg", r"names 'day/a.jpg' twice"),
        ("day/a", r"'day/a' occurs twice in split 'train'"),
        ("day/z.jpg", r"names 'day/z.jpg', but .*day/z.jpg does not exist"),
    ],
)
def test_bad_lines_are_refused(listed, line, message):
    with (listed / "train.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root=listed, split="train")


def test_a_listed_image_without_label_is_named(listed):
    (listed / "labels" / "day" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a.jpg has no label \(.*day/a.png is missing\).*train.txt"):
        open_dataset("folder", root=listed, split="train")


def test_two_images_of_one_name_are_refused(root):
    write(root / "images" / "train" / "0000.png", np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match=r"0000.jpg and .*0000.png differ in their extension only"):
        open_dataset("folder", root=root, split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ids: [0]", r"has no list of names"),
        ("names: []", r"has no list of names"),
        ("[a, b]", r"holds no mapping"),
        ("names: [a, b", r"is no valid YAML"),
        ("names: [a, b]\nids: [0]", r"has 2 names but 1 ids"),
        ("names: [a, b]\ncolours: [[0, 0, 0]]", r"has 2 names but 1 colours"),
        ("names: [a, b]\ncolours: red", r"has 2 names but no list of colours"),
        ("names: [a, b]\ncolours: [[0, 0, 0], [0, 0, 300]]", r"has the colour \[0, 0, 300\]"),
        ("names: [a, b]\nids: [0, 256]", r"has ids: \[0, 256\], but a list of whole numbers from 0 to 255"),
        ("names: [a, b]\nids: [0, true]", r"has ids: \[0, True\]"),
        ("names: [a, b]\nids: [1, 1]", r"uses value 1 twice"),
        ("names: [a, b]\nignore: [1]", r"uses value 1 twice among ids and ignore"),
        ("names: [a, a]", r"names a class twice: a"),
        ("names: [a, b]\ncolors: []", r"has an unknown key 'colors'; allowed are names, ids"),
    ],
)
def test_classes_that_do_not_fit_together_are_refused(tmp_path, text, message):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(path)


def test_too_many_classes_are_refused(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(f"names: [{', '.join(f'c{i}' for i in range(255))}]\nignore: []")
    with pytest.raises(InputError, match=r"has 255 classes; 1 to 253 are allowed"):
        read_classes(path)


def test_missing_files_and_wrong_levels(root):
    with pytest.raises(InputError, match=rf"is too deep for folder.*set dataset.root={root}$"):
        open_dataset("folder", root=root / "images", split="train")
    with pytest.raises(InputError, match=rf"is one level too shallow for folder.*set dataset.root={root}$"):
        open_dataset("folder", root=root.parent, split="train")
    (root / "classes.yaml").rename(root / "other.yaml")
    with pytest.raises(InputError, match=r"classes.yaml does not exist; write one .*dataset.reader.classes"):
        open_dataset("folder", root=root, split="train")
    assert len(open_dataset("folder", root=root, split="train", classes="other.yaml")) == 3
    assert len(open_dataset("folder", root=root, split="train", classes=str(root / "other.yaml"))) == 3


def test_wrong_masks_are_named(root):
    data = open_dataset("folder", root=root, split="train")
    path = data.samples[0].labels[0]
    write(path, np.full((3, 4), 7))
    with pytest.raises(InputError, match=r"7 \(12 pixels\); allowed are 0\.\.2, 5, 9"):
        data.label(0)
    write(path, np.zeros((3, 4, 3)))
    with pytest.raises(InputError, match=r"0000.png is a colour image"):
        data.label(0)


def test_default_colours_differ():
    colours = default_palette(253)
    assert len({tuple(colour) for colour in colours.tolist()}) == 253
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[1].tolist() == [128, 0, 0]
