"""Samples: official layouts that the readers accept, with their quirks, and pictures that show their labels."""

import json

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.errors import InputError
from segkit.synthetic.sample_maker import WRITERS, make_sample

SPLITS = {
    "cityscapes_coarse": ("train_extra", "val"),
    "cocostuff10k": ("train", "test"),
    "voc": ("train", "val"),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return {name: make_sample(name, folder / name, num_images=4, scale=0.2) for name in WRITERS}


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_class_occurs_in_training_and_validation(samples, name):
    train, val = SPLITS.get(name, ("train", "val"))
    least = 8 if name == "robotic_instrument" else 4
    for split, num in ((train, least), (val, max(2, least // 2) if least == 4 else 8)):
        data = open_dataset(name, root=samples[name], split=split)
        assert len(data) == num
        found = np.zeros(256, bool)
        for item in data:
            found[np.unique(item.label)] = True
        assert found[: data.num_classes].all()


@pytest.mark.parametrize("name", ["ade20k", "camvid", "cityscapes", "mapillary", "robotic_instrument", "voc"])
def test_pictures_show_their_labels(samples, name):
    """The nearest mean colour of the training pixels classifies most validation pixels.

    Of the 150 classes of ADE20K many have similar colours and differ in their stripes: 30 times chance will
    do.
    """
    train, val = (open_dataset(name, root=samples[name], split=split) for split in ("train", "val"))
    sums, counts = np.zeros((train.num_classes, 3)), np.zeros(train.num_classes)
    for item in train:
        for k in np.unique(item.label[item.label != 255]):
            sums[k] += item.image[item.label == k].sum(0)
            counts[k] += (item.label == k).sum()
    means = sums / counts[:, None]
    right = total = 0
    for item in val:
        valid = item.label != 255
        distance = ((item.image[valid][:, None, :].astype(np.float32) - means) ** 2).sum(-1)
        right += (distance.argmin(1) == item.label[valid]).sum()
        total += valid.sum()
    assert right / total > (0.2 if name == "ade20k" else 0.55)


def test_the_same_seed_writes_the_same_files(tmp_path):
    def content(folder):
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    first = content(make_sample("bdd100k", tmp_path / "a", num_images=2, scale=0.05, seed=3))
    assert content(make_sample("bdd100k", tmp_path / "b", num_images=2, scale=0.05, seed=3)) == first
    assert content(make_sample("bdd100k", tmp_path / "c", num_images=2, scale=0.05, seed=4)) != first


def mode_of(path):
    with Image.open(path) as picture:
        return picture.mode, picture.size


def test_modes_and_sizes_of_the_official_files(samples):
    voc = samples["voc"] / "VOCdevkit" / "VOC2012"
    assert mode_of(voc / "SegmentationClass" / "2007_000001.png")[0] == "P"
    assert mode_of(voc / "SegmentationClassAug" / "2010_000001.png")[0] == "L"
    bdd = samples["bdd100k"] / "bdd100k"
    mask = next((bdd / "labels" / "sem_seg" / "masks" / "val").iterdir())
    assert mode_of(mask) == ("L", (256, 144))
    assert mode_of(bdd / "labels" / "sem_seg" / "colormaps" / "val" / mask.name)[0] == "P"
    assert mode_of(bdd / "images" / "10k" / "val" / "80a9e37d-e4548ac1.jpg") == ("RGB", (144, 256))
    city = samples["cityscapes"]
    stem = "gtFine/train/aachen/aachen_000000_000019_gtFine"
    assert mode_of(city / f"{stem}_labelIds.png")[0] == "L"
    assert mode_of(city / f"{stem}_instanceIds.png")[0].startswith("I")
    assert mode_of(city / f"{stem}_color.png")[0] == "RGBA"
    assert json.loads((city / f"{stem}_polygons.json").read_text())["objects"] == []
    broken = city / "leftImg8bit/train_extra/troisdorf/troisdorf_000000_000073_leftImg8bit.png"
    assert mode_of(broken)[0] == "L"
    vistas = samples["mapillary"] / "training"
    assert mode_of(next((vistas / "labels").iterdir()))[0] == "P"
    assert mode_of(next((vistas / "instances").iterdir()))[0].startswith("I;16")


def test_cityscapes_instances_and_coarse_borders(samples):
    root = samples["cityscapes"]
    for path in sorted(root.glob("gtFine/train/*/*_labelIds.png")):
        raw = np.array(Image.open(path)).astype(int)
        instances = np.array(Image.open(str(path).replace("labelIds", "instanceIds"))).astype(int)
        np.testing.assert_array_equal(np.where(instances >= 1000, instances // 1000, instances), raw)
        coarse = np.array(Image.open(str(path).replace("gtFine", "gtCoarse"))).astype(int)
        assert ((coarse == raw) | (coarse == 0)).all()
        assert 0.02 < (coarse == 0).mean() < 0.9
    for path in root.glob("gtFine/test/*/*_labelIds.png"):
        assert set(np.unique(np.array(Image.open(path)))) <= {0, 1}, "dummies: the ego vehicle only"


def test_voc_void_lies_between_object_and_background(samples):
    path = samples["voc"] / "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png"
    mask = np.array(Image.open(path)).astype(int)
    left, right = mask[:, :-1], mask[:, 1:]
    changes = (left != right) & (left != 255) & (right != 255)
    assert not changes.any(), "no object touches the background without a border of 255 between them"


def test_one_image_will_do(tmp_path):
    for name in ("voc", "cocostuff10k", "cityscapes", "folder"):
        root = make_sample(name, tmp_path / name, num_images=1, scale=0.1)
        assert len(open_dataset(name, root=root, split="train")) == 1


def test_what_a_sample_refuses(tmp_path):
    with pytest.raises(InputError, match="no sample of data set 'pascal'; samples can be made of ade20k, bdd100k"):
        make_sample("pascal", tmp_path / "x")
    with pytest.raises(InputError, match=r"the seed of a sample is -1, but must be 0 or more; use --seed 0"):
        make_sample("camvid", tmp_path / "x", seed=-1)
    with pytest.raises(InputError, match="needs at least one image, got 0"):
        make_sample("voc", tmp_path / "x", num_images=0)
    for scale in (0, 1e-308, 0.009, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"scale of a sample's images is {scale}, but must be from 0.01 to 1"):
            make_sample("voc", tmp_path / "x", scale=scale)
    (tmp_path / "mine.txt").write_text("precious")
    for output in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="is not an empty folder; name a new folder with --output"):
            make_sample("voc", output)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
