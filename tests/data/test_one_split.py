"""Opening one split needs that split's files only, in every official layout."""

from __future__ import annotations

import os
import shutil

import pytest

from segkit.data import open_dataset
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample

# Data set, split, options, and the files that are needed beside the images and labels of the split.
CASES = [
    ("ade20k", "train", {}, []),
    ("ade20k", "val", {}, []),
    ("ade20k", "test", {}, ["release_test/list.txt"]),
    ("bdd100k", "train", {}, []),
    ("bdd100k", "val", {}, []),
    ("bdd100k", "test", {}, []),
    ("camvid", "train", {}, ["train.txt"]),
    ("camvid", "val", {}, ["val.txt"]),
    ("camvid", "test", {}, ["test.txt"]),
    ("cityscapes", "train", {}, []),
    ("cityscapes", "val", {}, []),
    ("cityscapes", "test", {}, []),
    ("cityscapes", "train_extra", {"labels": "coarse_train"}, []),
    ("cityscapes", "val", {"labels": "coarse"}, []),
    ("cocostuff10k", "train", {}, ["imageLists/train.txt"]),
    ("cocostuff10k", "test", {}, ["imageLists/test.txt"]),
    ("cocostuff10k", "all", {}, ["imageLists/all.txt"]),
    ("folder", "train", {}, ["classes.yaml"]),
    ("folder", "val", {}, ["classes.yaml"]),
    ("mapillary", "train", {}, ["config.json"]),
    ("mapillary", "val", {}, ["config.json"]),
    ("mapillary", "test", {}, []),
    ("robotic_instrument", "train", {}, []),
    ("robotic_instrument", "val", {}, []),
    ("robotic_instrument", "test", {}, []),
    ("robotic_instrument", "train", {"splits": "sequence", "fold": 1}, []),
    ("robotic_instrument", "val", {"splits": "sequence", "fold": 1}, []),
    ("voc", "train", {}, ["VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"]),
    ("voc", "val", {}, ["VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"]),
    ("voc", "trainval", {}, ["VOCdevkit/VOC2012/ImageSets/Segmentation/trainval.txt"]),
    ("voc", "test", {}, ["VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt"]),
    (
        "voc",
        "trainaug",
        {"augmentation": "folder"},
        [f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt" for split in ("train", "val")],
    ),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """{data set: folder}: a sample of every official layout."""
    root = tmp_path_factory.mktemp("samples")
    return {name: make_sample(name, root / name, num_images=2, scale=0.1) for name in {case[0] for case in CASES}}


@pytest.mark.parametrize(("name", "split", "options", "extra"), CASES)
def test_one_split_alone(samples, tmp_path, name, split, options, extra):
    whole = open_dataset(name, root=samples[name], split=split, **options)
    needed = {file for sample in whole.samples for file in (sample.image, *sample.labels)}
    needed |= {samples[name] / file for file in extra}
    root = tmp_path / "part"
    for file in needed:
        (root / file.relative_to(samples[name])).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root / file.relative_to(samples[name]))
    assert sum(len(files) for _, _, files in os.walk(root)) < sum(len(files) for _, _, files in os.walk(samples[name]))
    part = open_dataset(name, root=root, split=split, **options)
    assert [sample.name for sample in part.samples] == [sample.name for sample in whole.samples]
    assert part.labelled == whole.labelled
    assert not [note for note in part.notes if note not in whole.notes]
    for sample, index in zip(part.samples, range(len(part)), strict=True):
        assert root in sample.image.parents
        assert part[index].image.shape == whole[index].image.shape
    for file in extra:
        (root / file).unlink()
        with pytest.raises(InputError):
            open_dataset(name, root=root, split=split, **options)


def test_a_missing_split_is_named_in_its_own_place(samples, tmp_path):
    root = shutil.copytree(samples["ade20k"], tmp_path / "part")
    shutil.rmtree(root / "ADEChallengeData2016" / "images" / "validation")
    with pytest.raises(
        InputError, match=r"folder .*part/ADEChallengeData2016/images/validation does not exist; unpack"
    ):
        open_dataset("ade20k", root=root, split="val")
