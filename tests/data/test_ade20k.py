"""ADE20K SceneParse150: the shift of the label values, the test list with gaps, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from segkit.data import load_table, open_dataset
from segkit.data.labels import table_file
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample


@pytest.fixture
def root(tmp_path):
    return make_sample("ade20k", tmp_path / "ade", num_images=4)


def top(root):
    return root / "ADEChallengeData2016"


@pytest.mark.parametrize(("split", "folder", "num"), [("train", "training", 4), ("val", "validation", 2)])
def test_labels_are_shifted_by_one_and_zero_is_ignored(root, split, folder, num):
    data = open_dataset("ade20k", root=root, split=split)
    assert len(data) == num
    for item in data:
        raw = np.array(Image.open(top(root) / "annotations" / folder / f"{item.name}.png")).astype(int)
        assert (raw == 0).any()
        np.testing.assert_array_equal(item.label, np.where(raw == 0, 255, raw - 1))


def test_grayscale_images_become_rgb(root):
    path = top(root) / "images" / "training" / "ADE_train_00000002.jpg"
    with Image.open(path) as picture:
        assert picture.mode == "L"
    image = open_dataset("ade20k", root=root, split="train").image(1)
    assert image.shape[2] == 3
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_the_test_split_follows_its_list(root):
    data = open_dataset("ade20k", root=root, split="test")
    assert [sample.name for sample in data.samples] == ["ADE_test_00000001", "ADE_test_00000003"]
    assert not data.labelled
    (root / "release_test" / "testing" / "ADE_test_00000003.jpg").unlink()
    with pytest.raises(InputError, match=r"ADE_test_00000003.jpg, which .*list.txt of ade20k names, does not exist"):
        open_dataset("ade20k", root=root, split="test")
    (root / "release_test" / "list.txt").write_text("../../images/x.jpg\n")
    with pytest.raises(InputError, match=r"list.txt leaves the data set's folder"):
        open_dataset("ade20k", root=root, split="test")


def test_an_image_without_label_and_the_reverse(root):
    label = top(root) / "annotations" / "training" / "ADE_train_00000003.png"
    content = label.read_bytes()
    label.unlink()
    with pytest.raises(InputError, match=r"ADE_train_00000003.jpg of ade20k has no label"):
        open_dataset("ade20k", root=root, split="train")
    label.write_bytes(content)
    (top(root) / "images" / "training" / "ADE_train_00000003.jpg").unlink()
    with pytest.raises(InputError, match=r"label .*ADE_train_00000003.png of ade20k has no image"):
        open_dataset("ade20k", root=root, split="train")


def test_unknown_values_and_differing_sizes_are_named(root):
    path = top(root) / "annotations" / "training" / "ADE_train_00000001.png"
    raw = np.array(Image.open(path))
    raw[0, :5] = 151
    Image.fromarray(raw).save(path)
    data = open_dataset("ade20k", root=root, split="train")
    with pytest.raises(InputError, match=r"ADE_train_00000001.png has values .*151 \(5 pixels\)"):
        data.label(0)
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"ADE_train_00000001.jpg is \d+x\d+ but its label .* is 9x7"):
        data[0]
    Image.fromarray(np.zeros((7, 9), np.uint16)).save(path)
    with pytest.raises(InputError, match=r"ADE_train_00000001.png has 16 or more bits"):
        data.label(0)


def test_folder_levels(root):
    assert len(open_dataset("ade20k", root=top(root), split="val")) == 2
    with pytest.raises(InputError, match=rf"is too deep for ade20k.*set dataset.root={top(root)}$"):
        open_dataset("ade20k", root=top(root) / "images", split="val")
    with pytest.raises(InputError, match=rf"is one level too shallow for ade20k.*set dataset.root={root}$"):
        open_dataset("ade20k", root=root.parent, split="val")


def test_a_missing_part_of_the_archive_is_named(root):
    (top(root) / "annotations" / "validation").rename(top(root) / "annotations" / "moved")
    with pytest.raises(InputError, match=r"validation does not exist; unpack ADEChallengeData2016.zip"):
        open_dataset("ade20k", root=root, split="val")
    with pytest.raises(InputError, match=r"testing does not exist; unpack release_test.zip"):
        open_dataset("ade20k", root=top(root) / "annotations" / "training", split="test")


@pytest.mark.data
def test_real_pairs(shared_data):
    root = shared_data / "samples" / "ade20k"
    for split, name in (("train", "ADE_train_00000001"), ("val", "ADE_val_00000001")):
        data = open_dataset("ade20k", root=root, split=split)
        assert [sample.name for sample in data.samples] == [name]
        raw = np.array(Image.open(data.samples[0].labels[0])).astype(int)
        item = data[0]
        np.testing.assert_array_equal(item.label, np.where(raw == 0, 255, raw - 1))
        assert len(np.unique(item.label)) > 3


@pytest.mark.data
def test_the_table_has_the_first_synonyms_of_the_official_list(shared_data):
    text = (shared_data / "samples/ade20k/ADEChallengeData2016/objectInfo150.txt").read_text()
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    table, extra = load_table("ade20k"), table_file("ade20k")
    assert len(rows) == 150
    for index, row in enumerate(rows):
        assert int(row[0]) == index + 1
        assert table.classes[index] == row[4].split(",")[0].strip()
        assert extra["pixel_ratio"][index] == float(row[1])
        assert (extra["images_train"][index], extra["images_val"][index]) == (int(row[2]), int(row[3]))
