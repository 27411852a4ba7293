"""COCO-Stuff 10K: .mat files, the eleven unused ids, version 1.0, and what is refused."""

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from segkit.data import load_table, open_dataset
from segkit.data.labels import table_file
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample

NAMES = [table_file("cocostuff10k")["raw_names"][str(raw)] for raw in range(1, 183)]


@pytest.fixture
def root(tmp_path):
    return make_sample("cocostuff10k", tmp_path / "coco", num_images=4)


def change(root, name, **fields):
    path = root / "annotations" / f"{name}.mat"
    content = {key: value for key, value in loadmat(path).items() if not key.startswith("__")}
    savemat(path, {**content, **fields})
    return path


FIRST = "COCO_train2014_000000000001"


def slow_map():
    """The 171 classes in the order of their ids, without the unused ones: train id = rank among the used."""
    unused = {int(raw) for raw in table_file("cocostuff10k")["unused_raw_ids"]}
    used = [raw for raw in range(1, 183) if raw not in unused]
    return {0: 255, **dict.fromkeys(unused, 255), **{raw: rank for rank, raw in enumerate(used)}}


def test_labels_equal_the_field_s_through_the_table(root):
    to_train = slow_map()
    assert load_table("cocostuff10k").raw_to_train == to_train
    for split, num in (("train", 4), ("test", 2), ("all", 6)):
        data = open_dataset("cocostuff10k", root=root, split=split)
        assert len(data) == num
        for item in data:
            stored = loadmat(root / "annotations" / f"{item.name}.mat")["S"]
            assert stored.dtype == np.float64, "as MATLAB stores it"
            expected = np.vectorize(to_train.get)(stored.astype(int))
            np.testing.assert_array_equal(item.label, expected)


def test_class_names_are_those_of_their_ids():
    table = load_table("cocostuff10k")
    for train, raw in table.train_to_raw.items():
        assert table.classes[train] == NAMES[raw - 1]


def test_other_storage_types_are_read_alike(root):
    data = open_dataset("cocostuff10k", root=root, split="train")
    before = data.label(0)
    stored = loadmat(root / "annotations" / f"{FIRST}.mat")["S"]
    for dtype in (np.uint8, np.int16, np.float32):
        change(root, FIRST, S=stored.astype(dtype))
        np.testing.assert_array_equal(data.label(0), before)


def test_version_one_is_refused(root):
    names = np.array([[name] for name in NAMES[:172]], object)
    change(root, FIRST, names=names)
    with pytest.raises(InputError, match=r"names 172 classes, but files of version 1.1 name 182; version 1.0"):
        open_dataset("cocostuff10k", root=root, split="train").label(0)


def test_bad_label_maps_are_named(root):
    data = open_dataset("cocostuff10k", root=root, split="train")
    stored = loadmat(root / "annotations" / f"{FIRST}.mat")["S"]
    change(root, FIRST, S=stored + 0.5)
    with pytest.raises(InputError, match=rf"{FIRST}.mat has label values that are not whole numbers"):
        data.label(0)
    wrong = stored.copy()
    wrong[0, :4], wrong[1, 0] = 183, 3
    change(root, FIRST, S=wrong)
    with pytest.raises(InputError, match=rf"{FIRST}.mat has values .*183 \(4 pixels\)"):
        data.label(0)
    change(root, FIRST, S=np.zeros((3, 4, 2)))
    with pytest.raises(InputError, match=r"has no label map S"):
        data.label(0)
    path = change(root, FIRST, S=np.zeros((3, 4)))
    with pytest.raises(InputError, match=r"is \d+x\d+ but its label .*is 4x3"):
        data[0]
    path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + bytes(400))
    with pytest.raises(InputError, match=r"is a MATLAB 7.3 file"):
        data.label(0)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"is empty \(0 bytes\)"):
        data.label(0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (FIRST, "twice; remove one of the two lines"),
        ("../annotations/x", "leaves the data set's folder"),
        ("COCO_train2014_999999999999", r"999999.jpg, which .*train.txt of cocostuff10k names"),
    ],
)
def test_bad_list_entries_are_refused(root, entry, message):
    with (root / "imageLists" / "train.txt").open("a") as file:
        file.write(f"{entry}\n")
    with pytest.raises(InputError, match=message):
        open_dataset("cocostuff10k", root=root, split="train")


def test_a_missing_label_file_list_or_folder_is_named(root):
    (root / "annotations" / f"{FIRST}.mat").unlink()
    with pytest.raises(InputError, match=rf"{FIRST}.mat, which .*train.txt of cocostuff10k names"):
        open_dataset("cocostuff10k", root=root, split="train")
    (root / "imageLists" / "test.txt").unlink()
    with pytest.raises(InputError, match=r"lacks its list file .*test.txt; unpack cocostuff-10k-v1.1.zip"):
        open_dataset("cocostuff10k", root=root, split="test")
    (root / "images").rename(root / "pictures")
    with pytest.raises(InputError, match=r"images does not exist; unpack cocostuff-10k-v1.1.zip"):
        open_dataset("cocostuff10k", root=root, split="train")


def test_folder_levels(root):
    with pytest.raises(InputError, match=rf"is too deep for cocostuff10k.*set dataset.root={root}$"):
        open_dataset("cocostuff10k", root=root / "images", split="train")
    with pytest.raises(InputError, match=rf"one level too shallow for cocostuff10k.*set dataset.root={root}$"):
        open_dataset("cocostuff10k", root=root.parent, split="train")
    with pytest.raises(InputError, match="has no split 'val'; allowed are train, test, all"):
        open_dataset("cocostuff10k", root=root, split="val")


@pytest.mark.data
def test_real_files(shared_data):
    root, to_train = shared_data / "samples" / "cocostuff10k", slow_map()
    sets = [open_dataset("cocostuff10k", root=root, split=split) for split in ("train", "test")]
    names = [data.samples[0].name for data in sets]
    assert names == ["COCO_train2014_000000119938", "COCO_train2014_000000206927"]
    for item in open_dataset("cocostuff10k", root=root, split="all"):
        content = loadmat(root / "annotations" / f"{item.name}.mat")
        np.testing.assert_array_equal(item.label, np.vectorize(to_train.get)(content["S"].astype(int)))
        assert [str(name[0][0]) for name in content["names"]] == NAMES, "the file's own names"
        assert item.image.shape[:2] == item.label.shape
