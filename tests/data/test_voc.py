"""VOC 2012 and SBD: the derived trainaug, where each mask comes from, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from segkit.data import load_table, open_dataset
from segkit.data.labels import table_file
from segkit.data.readers import voc
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample


@pytest.fixture
def root(tmp_path):
    return make_sample("voc", tmp_path / "voc", num_images=4)


def lines(path):
    return path.read_text().split()


def devkit(root):
    return root / "VOCdevkit" / "VOC2012"


def lists(root):
    return devkit(root) / "ImageSets" / "Segmentation"


def sbd(root):
    return root / "benchmark_RELEASE" / "dataset"


@pytest.mark.parametrize("split", ["train", "val", "trainval"])
def test_official_masks_are_read_as_palette_indices(root, split):
    data = open_dataset("voc", root=root, split=split)
    assert [sample.name for sample in data.samples] == lines(lists(root) / f"{split}.txt")
    for item in data:
        with Image.open(devkit(root) / "SegmentationClass" / f"{item.name}.png") as mask:
            assert mask.mode == "P"
            np.testing.assert_array_equal(item.label, np.array(mask))
        assert 255 in item.label, "the void border"
        assert item.image.shape == (*item.label.shape, 3)


def test_trainaug_is_the_union_without_the_validation_images(root):
    train, val = lines(lists(root) / "train.txt"), lines(lists(root) / "val.txt")
    sbd_train, sbd_val = lines(sbd(root) / "train.txt"), lines(sbd(root) / "val.txt")
    assert set(sbd_train) & set(val), "the lists overlap as the official ones do"
    assert set(sbd_val) & set(train)
    data = open_dataset("voc", root=root, split="trainaug")
    names = [sample.name for sample in data.samples]
    assert names == sorted((set(train) | set(sbd_train) | set(sbd_val)) - set(val))
    for sample in data.samples:
        assert sample.labels[0].suffix == (".png" if sample.name in train else ".mat")
    assert data.notes == ("trainaug: 4 masks of VOC, 4 of SBD",)


def test_sbd_masks_are_the_segmentation_of_the_mat_files(root):
    data = open_dataset("voc", root=root, split="trainaug")
    index = next(i for i, sample in enumerate(data.samples) if sample.labels[0].suffix == ".mat")
    stored = loadmat(data.samples[index].labels[0])["GTcls"][0, 0]["Segmentation"]
    np.testing.assert_array_equal(data.label(index), stored)
    assert data.label(index).dtype == np.uint8


def test_the_community_folder_gives_the_same_samples(root):
    by_mat = open_dataset("voc", root=root, split="trainaug")
    shutil.rmtree(root / "benchmark_RELEASE")
    by_png = open_dataset("voc", root=root, split="trainaug", augmentation="folder")
    assert [s.name for s in by_png.samples] == [s.name for s in by_mat.samples]
    # The official masks of the training images stay in use: SegmentationClassAug holds copies of them.
    train = lines(lists(root) / "train.txt")
    for sample in by_png.samples:
        expected = "SegmentationClass" if sample.name in train else "SegmentationClassAug"
        assert sample.labels[0].parent.name == expected
    assert by_png.notes == ("trainaug: 4 masks of VOC, 4 of SegmentationClassAug",)


def test_images_that_only_sbd_has_are_taken_from_it(root):
    name = lines(sbd(root) / "train.txt")[-1]
    (devkit(root) / "JPEGImages" / f"{name}.jpg").unlink()
    data = open_dataset("voc", root=root, split="trainaug")
    image = next(sample.image for sample in data.samples if sample.name == name)
    assert image == sbd(root) / "img" / f"{name}.jpg"


def test_the_count_is_verified_where_the_lists_are_whole(root, monkeypatch):
    whole = table_file("voc")["splits"]
    for name, number in {"train": 4, "val": 2, "sbd_train": 3, "sbd_val": 3, "trainaug": 8}.items():
        monkeypatch.setitem(whole, name, number)
    assert len(open_dataset("voc", root=root, split="trainaug")) == 8
    monkeypatch.setitem(whole, "trainaug", 9)
    with pytest.raises(InputError, match="trainaug of voc has 8 images, but the official lists give 9"):
        open_dataset("voc", root=root, split="trainaug")
    monkeypatch.setitem(whole, "train", 5)
    assert len(open_dataset("voc", root=root, split="trainaug")) == 8, "not whole, not judged"


def test_the_official_numbers_agree_with_each_other():
    splits = load_table("voc").splits
    known = {"train": 1464, "val": 1449, "sbd_train": 8498, "sbd_val": 2857, "trainaug": 10582}
    assert {name: splits[name] for name in known} == known
    assert splits["train"] + splits["val"] == splits["trainval"]


def test_the_test_split_has_no_labels(root):
    data = open_dataset("voc", root=root, split="test")
    assert not data.labelled
    assert (data[0].label == 255).all()
    with pytest.raises(InputError, match="split 'test' of voc has no labels"):
        data.label(0)


@pytest.mark.parametrize("inner", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_root_may_be_any_folder_that_the_archive_makes(root, inner):
    for split in ("val", "trainaug"):
        assert len(open_dataset("voc", root=root / inner, split=split)) == len(
            open_dataset("voc", root=root, split=split)
        )


def test_wrong_folder_levels_are_named(root):
    with pytest.raises(InputError, match=rf"is too deep for voc.*set dataset.root={devkit(root)}$"):
        open_dataset("voc", root=devkit(root) / "JPEGImages", split="val")
    with pytest.raises(InputError, match=rf"is one level too shallow for voc.*set dataset.root={root}$"):
        open_dataset("voc", root=root.parent, split="val")
    with pytest.raises(InputError, match=r"JPEGImages does not exist; unpack VOCtrainval_11-May-2012.tar"):
        open_dataset("voc", root=root.parent / "nowhere" / "at" / "all", split="val")
    with pytest.raises(InputError, match=r"data set voc needs its folder; set dataset.root=FOLDER"):
        voc.read(None, split="val")


def test_sbd_may_lie_elsewhere_and_is_asked_for_where_it_is_missing(root, tmp_path):
    shutil.move(root / "benchmark_RELEASE", tmp_path / "sbd")
    with pytest.raises(InputError, match=r"needs SBD.*unpack benchmark.tgz.*augmentation=folder to use"):
        open_dataset("voc", root=root, split="trainaug")
    assert len(open_dataset("voc", root=root, split="trainaug", sbd_root=tmp_path / "sbd")) == 8
    shutil.rmtree(devkit(root) / "SegmentationClassAug")
    with pytest.raises(InputError, match=r"name its folder in dataset.reader.sbd_root$"):
        open_dataset("voc", root=root, split="trainaug")
    with pytest.raises(InputError, match=r"SegmentationClassAug does not exist; unpack SegmentationClassAug.zip"):
        open_dataset("voc", root=root, split="trainaug", augmentation="folder")


def test_unknown_options_and_splits_are_refused(root):
    with pytest.raises(InputError, match="voc has no augmentation 'png'; allowed are sbd, folder"):
        open_dataset("voc", root=root, split="trainaug", augmentation="png")
    with pytest.raises(InputError, match="voc has no split 'training'; allowed are train, val"):
        open_dataset("voc", root=root, split="training")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("../../../2007_000001", r"leaves the data set's folder"),
        ("/etc/passwd", r"leaves the data set's folder"),
        ("2007_000001", r"names '2007_000001' twice"),
        ("2007_999999", r"SegmentationClass/2007_999999.png, which .*train.txt of voc names, does not exist"),
    ],
)
def test_bad_list_entries_are_refused(root, entry, message):
    with (lists(root) / "train.txt").open("a") as file:
        file.write(f"{entry}\n")
    with pytest.raises(InputError, match=message):
        open_dataset("voc", root=root, split="train")


def test_an_empty_or_missing_list_is_refused(root):
    (lists(root) / "val.txt").write_text("\n")
    with pytest.raises(InputError, match=r"val.txt has no entries, so the split is empty"):
        open_dataset("voc", root=root, split="val")
    (lists(root) / "test.txt").unlink()
    with pytest.raises(InputError, match=r"lacks its list file .*test.txt; unpack VOC2012test.tar"):
        open_dataset("voc", root=root, split="test")


def test_a_missing_image_or_mask_is_named(root):
    (devkit(root) / "JPEGImages" / "2007_000002.jpg").unlink()
    with pytest.raises(InputError, match=r"2007_000002.jpg, which .*train.txt of voc names, does not exist"):
        open_dataset("voc", root=root, split="train")
    name = lines(sbd(root) / "train.txt")[-1]
    (sbd(root) / "cls" / f"{name}.mat").unlink()
    with pytest.raises(InputError, match=rf"{name}.mat, which .*train.txt of SBD names, does not exist"):
        voc._sbd_masks(sbd(root), {})


def test_an_sbd_mask_without_an_image_is_named(root):
    name = lines(sbd(root) / "val.txt")[-1]
    (devkit(root) / "JPEGImages" / f"{name}.jpg").unlink()
    (sbd(root) / "img" / f"{name}.jpg").unlink()
    with pytest.raises(InputError, match=rf"label .*{name}.mat of voc has no image \(.*{name}.jpg is missing\)"):
        open_dataset("voc", root=root, split="trainaug")


def test_overlapping_official_lists_are_refused(root):
    with (lists(root) / "val.txt").open("a") as file:
        file.write("2007_000001\n")
    with pytest.raises(InputError, match=r"2007_000001 is in train.txt and in val.txt"):
        open_dataset("voc", root=root, split="trainaug")


def test_unknown_values_and_damaged_files_are_named(root):
    path = devkit(root) / "SegmentationClass" / "2007_000001.png"
    mask = np.array(Image.open(path))
    mask[:2, :3] = 99
    Image.fromarray(mask).save(path)
    with pytest.raises(InputError, match=r"2007_000001.png has values .*99 \(6 pixels\); allowed are 0\.\.20, 255"):
        open_dataset("voc", root=root, split="train").label(0)
    Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"2007_000001.png is a colour image"):
        open_dataset("voc", root=root, split="train").label(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"no matlab file at all, but a text", r"is damaged or no MATLAB file"),
        ({"other": np.zeros(3)}, r"has no field GTcls.Segmentation"),
        ({"GTcls": {"Segmentation": np.zeros((4, 4))}}, r"segmentation of shape \(4, 4\) and type float64"),
    ],
)
def test_bad_mat_files_are_named(tmp_path, content, message):
    path = tmp_path / "2010_000001.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    with pytest.raises(InputError, match=message):
        voc.read_sbd_mask(path)


def test_a_truncated_mat_file_is_named(root):
    path = next((sbd(root) / "cls").glob("2010*.mat"))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=rf"{path.name} is damaged"):
        voc.read_sbd_mask(path)
