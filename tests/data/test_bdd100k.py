"""BDD100K: both layouts, the pairs that do not match, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from segkit.data import load_table, open_dataset
from segkit.data.labels import table_file
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample

MISMATCHED = table_file("bdd100k")["mismatched_pairs"]


@pytest.fixture
def root(tmp_path):
    return make_sample("bdd100k", tmp_path / "bdd", num_images=4)


def to_old_layout(root):
    """Rearrange the sample as bdd100k_seg.zip of 2018 unpacks."""
    top = root / "bdd100k"
    seg = top / "seg"
    for split in ("train", "val", "test"):
        shutil.move(top / "images" / "10k" / split, seg / "images" / split)
    for split in ("train", "val"):
        (seg / "labels" / split).mkdir(parents=True)
        for path in (top / "labels" / "sem_seg" / "masks" / split).iterdir():
            shutil.move(path, seg / "labels" / split / f"{path.stem}_train_id.png")
    shutil.rmtree(top / "images")
    shutil.rmtree(top / "labels")
    return root


def test_masks_hold_train_ids(root):
    for split, num in (("train", 4), ("val", 2)):
        data = open_dataset("bdd100k", root=root, split=split)
        assert len(data) == num
        for item in data:
            path = root / "bdd100k" / "labels" / "sem_seg" / "masks" / split / f"{item.name}.png"
            np.testing.assert_array_equal(item.label, np.array(Image.open(path)))
            assert 255 in item.label
    assert not open_dataset("bdd100k", root=root, split="test").labelled


def test_classes_are_those_of_cityscapes():
    bdd, cityscapes = load_table("bdd100k"), load_table("cityscapes")
    assert bdd.classes == cityscapes.classes
    np.testing.assert_array_equal(bdd.palette, cityscapes.palette)


@pytest.mark.parametrize("split", ["train", "val"])
def test_portrait_pairs_are_skipped_and_said(root, split):
    portrait = MISMATCHED["portrait"][split][0]
    data = open_dataset("bdd100k", root=root, split=split)
    assert portrait not in [sample.name for sample in data.samples]
    note = f"skipped 1 pair of {split} with a portrait image beside a landscape mask: {portrait}"
    assert data.notes == (note,)
    everything = open_dataset("bdd100k", root=root, split=split, skip_mismatched=False)
    assert len(everything) == len(data) + 1
    assert everything.notes == ()
    index = [sample.name for sample in everything.samples].index(portrait)
    with pytest.raises(InputError, match=rf"{portrait}.jpg is 180x320 but its label .* is 320x180"):
        everything[index]


def test_the_layout_of_2018(root):
    new = open_dataset("bdd100k", root=root, split="train")
    items = {item.name: item.label for item in new}
    to_old_layout(root)
    for folder in (root, root / "bdd100k"):
        old = open_dataset("bdd100k", root=folder, split="train")
        assert [sample.name for sample in old.samples] == list(items)
        for item in old:
            np.testing.assert_array_equal(item.label, items[item.name])
    assert len(open_dataset("bdd100k", root=root, split="test")) == 2


def test_the_pairs_that_only_2018_has_are_skipped_too(root):
    to_old_layout(root)
    seg = root / "bdd100k" / "seg"
    image = next((seg / "images" / "val").glob("*.jpg"))
    for key in MISMATCHED["old"]["val"]:
        shutil.copy(image, seg / "images" / "val" / f"{key}.jpg")
        mask = seg / "labels" / "val" / f"{image.stem}_train_id.png"
        shutil.copy(mask, mask.with_name(f"{key}_train_id.png"))
    data = open_dataset("bdd100k", root=root, split="val")
    assert len(data) == 2
    start = "skipped 2 pairs of val that only the release of 2018 has"
    assert any(note.startswith(start) for note in data.notes)


def test_the_published_counts_minus_the_skipped():
    splits = load_table("bdd100k").splits
    for release in ("portrait", "old"):
        pairs = MISMATCHED[release]
        assert [splits[split] - len(pairs[split]) for split in ("train", "val")] == [6996, 998]
    assert not set(MISMATCHED["old"]["train"]) & set(MISMATCHED["portrait"]["train"])


def test_an_image_without_label_and_the_reverse(root):
    masks = root / "bdd100k" / "labels" / "sem_seg" / "masks" / "train"
    path = sorted(masks.iterdir())[0]
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.stem}.jpg of bdd100k has no label \({path} is missing\)"):
        open_dataset("bdd100k", root=root, split="train")
    path.write_bytes(content)
    (root / "bdd100k" / "images" / "10k" / "train" / f"{path.stem}.jpg").unlink()
    with pytest.raises(InputError, match=rf"label {path} of bdd100k has no image"):
        open_dataset("bdd100k", root=root, split="train")


def test_missing_archives_and_wrong_levels(root):
    top = root / "bdd100k"
    assert len(open_dataset("bdd100k", root=top, split="val")) == 2
    with pytest.raises(InputError, match=rf"is too deep for bdd100k.*set dataset.root={top}$"):
        open_dataset("bdd100k", root=top / "labels", split="val")
    with pytest.raises(InputError, match=rf"is one level too shallow for bdd100k.*set dataset.root={root}$"):
        open_dataset("bdd100k", root=root.parent, split="val")
    shutil.rmtree(top / "labels")
    with pytest.raises(InputError, match=r"masks/val does not exist; unpack .*bdd100k_sem_seg_labels_trainval.zip"):
        open_dataset("bdd100k", root=root, split="val")
    shutil.rmtree(top / "images")
    with pytest.raises(InputError, match=r"images/10k does not exist; unpack bdd100k_images_10k.zip"):
        open_dataset("bdd100k", root=root, split="val")


def test_unknown_values_are_named(root):
    data = open_dataset("bdd100k", root=root, split="train")
    path = data.samples[0].labels[0]
    Image.fromarray(np.full((180, 320), 19, np.uint8)).save(path)
    with pytest.raises(InputError, match=r"19 \(57600 pixels\); allowed are 0\.\.18, 255"):
        data.label(0)


def test_an_empty_split_is_refused(root):
    for folder in ("images/10k/val", "labels/sem_seg/masks/val"):
        for path in (root / "bdd100k" / folder).iterdir():
            path.unlink()
    with pytest.raises(InputError, match="split 'val' of bdd100k has no samples"):
        open_dataset("bdd100k", root=root, split="val")
