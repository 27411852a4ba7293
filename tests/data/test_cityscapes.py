"""The Cityscapes reader, fine and coarse, on drawn trees and on the real pair."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.errors import InputError

RNG = np.random.default_rng(0)
BROKEN = "troisdorf_000000_000073"


def add(root, split, key, *, kinds=("gtFine",), image=True, raw=None):
    city = key.split("_")[0]
    if image:
        folder = root / "leftImg8bit" / split / city
        folder.mkdir(parents=True, exist_ok=True)
        pixels = RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{key}_leftImg8bit.png")
    for kind in kinds:
        folder = root / kind / split / city
        folder.mkdir(parents=True, exist_ok=True)
        ids = RNG.integers(0, 34, (8, 16), dtype=np.uint8) if raw is None else raw
        Image.fromarray(ids).save(folder / f"{key}_{kind}_labelIds.png")
        Image.fromarray(ids.astype(np.uint16)).save(folder / f"{key}_{kind}_instanceIds.png")
        Image.fromarray(np.zeros((8, 16, 4), np.uint8)).save(folder / f"{key}_{kind}_color.png")
        (folder / f"{key}_{kind}_polygons.json").write_text("{}")


@pytest.fixture
def tree(tmp_path):
    both = ("gtFine", "gtCoarse")
    add(tmp_path, "train", "zurich_000000_000019", kinds=both)
    add(tmp_path, "train", "aachen_000001_000019", kinds=both)
    add(tmp_path, "train", "aachen_000000_000019", kinds=both)
    add(tmp_path, "val", "munster_000000_000019", kinds=both)
    add(tmp_path, "test", "berlin_000000_000019", raw=np.zeros((8, 16), np.uint8))
    for key in (BROKEN, "troisdorf_000000_000074"):
        add(tmp_path, "train_extra", key, kinds=("gtCoarse",))
    return tmp_path


def official_train_ids(raw):
    """The 19 evaluated ids in the order of the benchmark, written out independently of the table file."""
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    return np.array([[evaluated.index(v) if v in evaluated else 255 for v in row] for row in raw.tolist()])


def test_fine_labels_are_mapped_from_ids(tree):
    data = open_dataset("cityscapes", root=tree, split="train")
    names = ["aachen_000000_000019", "aachen_000001_000019", "zurich_000000_000019"]
    assert [sample.name for sample in data.samples] == names
    assert data.notes == ()
    for item, sample in zip(data, data.samples, strict=True):
        raw = np.asarray(Image.open(sample.labels[0]))
        assert "gtFine" in sample.labels[0].name
        np.testing.assert_array_equal(item.label, official_train_ids(raw))


def test_train_to_raw_is_what_the_server_wants(tree):
    table = open_dataset("cityscapes", root=tree, split="val").table
    assert [table.train_to_raw[k] for k in (0, 1, 2, 16, 18)] == [7, 8, 11, 31, 33]
    assert all(table.raw_to_train[raw] == train for train, raw in table.train_to_raw.items())


def test_coarse(tree):
    data = open_dataset("cityscapes_coarse", root=tree, split="train_extra")
    assert [sample.name for sample in data.samples] == ["troisdorf_000000_000074"]
    assert len(data.notes) == 1
    assert BROKEN in data.notes[0]
    assert "gtCoarse" in open_dataset("cityscapes", root=tree, split="val", labels="coarse").samples[0].labels[0].name
    assert "gtFine" in open_dataset("cityscapes_coarse", root=tree, split="val").samples[0].labels[0].name
    assert "gtCoarse" in open_dataset("cityscapes_coarse", root=tree, split="train").samples[0].labels[0].name


def test_the_broken_pair_may_lack_a_half(tree):
    (tree / "gtCoarse/train_extra/troisdorf" / f"{BROKEN}_gtCoarse_labelIds.png").unlink()
    assert len(open_dataset("cityscapes_coarse", root=tree, split="train_extra")) == 1


def test_test_split_is_unlabelled(tree):
    data = open_dataset("cityscapes", root=tree, split="test")
    assert not data.labelled
    assert (data[0].label == 255).all()


def test_wrong_options(tree):
    with pytest.raises(InputError, match=r"train_extra of cityscapes has coarse labels only; .*labels=coarse_train"):
        open_dataset("cityscapes", root=tree, split="train_extra")
    with pytest.raises(InputError, match="no labels 'rough'; allowed are fine, coarse, coarse_train"):
        open_dataset("cityscapes", root=tree, split="train", labels="rough")
    with pytest.raises(InputError, match="no split 'training'; allowed are train, val, test, train_extra"):
        open_dataset("cityscapes", root=tree, split="training")


def test_missing_parts(tree, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    expected = r"leftImg8bit/train does not exist; unpack leftImg8bit_trainvaltest\.zip and gtFine_trainvaltest\.zip .*"
    with pytest.raises(InputError, match=expected + r"dataset\.root"):
        open_dataset("cityscapes", root=empty, split="train")
    with pytest.raises(InputError, match=r"unpack leftImg8bit_trainextra\.zip and gtCoarse\.zip"):
        open_dataset("cityscapes_coarse", root=empty, split="train_extra")
    with pytest.raises(InputError, match=rf"is too deep for cityscapes.*set dataset\.root={tree}$"):
        open_dataset("cityscapes", root=tree / "leftImg8bit", split="train")
    (empty / "leftImg8bit" / "train" / "aachen").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has no file <city>/\*_leftImg8bit\.png, so the split is empty"):
        open_dataset("cityscapes", root=empty, split="train")


def test_image_without_label_and_the_reverse(tree):
    label = tree / "gtFine/train/zurich/zurich_000000_000019_gtFine_labelIds.png"
    kept = label.read_bytes()
    label.unlink()
    expected = (
        r"image .*zurich_000000_000019_leftImg8bit\.png of cityscapes has no label \(.*gtFine/train/zurich/zurich"
    )
    with pytest.raises(InputError, match=expected):
        open_dataset("cityscapes", root=tree, split="train")
    label.write_bytes(kept)
    (tree / "leftImg8bit/train/zurich/zurich_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(InputError, match=r"label .*zurich_000000_000019_gtFine_labelIds\.png .* has no image"):
        open_dataset("cityscapes", root=tree, split="train")


def test_unknown_id(tree):
    add(tree, "train", "aachen_000000_000019", raw=np.full((8, 16), 34, np.uint8))
    with pytest.raises(InputError, match=r"aachen_000000_000019_gtFine_labelIds\.png has values .* 34 \(128 pixels\)"):
        open_dataset("cityscapes", root=tree, split="train")[0]


def test_instance_file_in_place_of_a_label(tree):
    folder = tree / "gtFine/train/zurich"
    name = "zurich_000000_000019_gtFine"
    (folder / f"{name}_labelIds.png").write_bytes((folder / f"{name}_instanceIds.png").read_bytes())
    with pytest.raises(InputError, match=r"labelIds\.png has 16 or more bits per pixel"):
        open_dataset("cityscapes", root=tree, split="train")[2]
    (folder / f"{name}_labelIds.png").write_bytes((folder / f"{name}_color.png").read_bytes())
    with pytest.raises(InputError, match=r"labelIds\.png is a colour image"):
        open_dataset("cityscapes", root=tree, split="train")[2]


@pytest.mark.data
def test_real_pair(shared_data):
    data = open_dataset("cityscapes", root=shared_data / "samples" / "cityscapes", split="val")
    assert [sample.name for sample in data.samples] == ["frankfurt_000000_000294"]
    item = data[0]
    assert item.image.shape == (128, 256, 3)
    # The train ids beside it were shrunk on their own, so that single pixels at edges differ.
    beside = data.samples[0].labels[0].with_name("frankfurt_000000_000294_gtFine_labelTrainIds.png")
    assert (np.asarray(Image.open(beside)) == item.label).mean() > 0.99


def test_one_frame_in_two_cities(tree):
    add(tree, "train", "zurich_000000_000019")
    folder = tree / "leftImg8bit/train"
    name = "zurich_000000_000019_leftImg8bit.png"
    (folder / "aachen" / name).write_bytes((folder / "zurich" / name).read_bytes())
    with pytest.raises(InputError, match=r"'zurich_000000_000019' occurs twice in cityscapes .*; remove one of them"):
        open_dataset("cityscapes", root=tree, split="train")
