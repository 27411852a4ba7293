"""Splits that ``dataset=folder`` cuts by a hash of names: a share, folds, groups."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from label_files import (
    configured,
    make,
    save,
)

from segkit.check.check import check
from segkit.data import open_dataset
from segkit.errors import InputError
from segkit.run.splits import open_split


@pytest.fixture
def frames(tmp_path):
    """60 frames of 20 videos in one folder, with masks beside them."""
    for number in range(60):
        place = tmp_path / "photos" / f"video_{number // 3}_{number % 3}"
        save(place.with_suffix(".png"), np.full((8, 8, 3), number, np.uint8))
        save(place.with_name(place.name + "_mask.png"), np.full((8, 8), number == 0, np.uint8))
    (tmp_path / "classes.yaml").write_text("names: [ground, tool]")
    return tmp_path


FOLDERS = {"images": "photos", "labels": "photos", "label_suffix": "_mask"}


def names_of(root, split, **options):
    return {sample.name for sample in open_dataset("folder", root=root, split=split, **FOLDERS, **options).samples}


def test_a_share_of_the_images_is_val_in_the_order_of_their_hashes(frames):
    train, val = (names_of(frames, split, val_fraction=0.3) for split in ("train", "val"))
    assert (len(train) + len(val), train & val) == (60, set())
    digests = {hashlib.blake2b(name.encode(), digest_size=8, salt=b"val").hexdigest(): name for name in train | val}
    assert val == {digests[digest] for digest in sorted(digests)[:18]}, "0.3 of 60 in the order of their hashes"
    (frames / "photos" / "video_0_0.png").unlink()
    (frames / "photos" / "video_0_0_mask.png").unlink()
    assert len(names_of(frames, "val", val_fraction=0.3) - val) <= 1, "the others stay where they are"
    few = {f"video_{number}_{frame}" for number in range(3, 7) for frame in range(3)}
    for path in (frames / "photos").iterdir():
        if path.stem.removesuffix("_mask") not in few:
            path.unlink()
    for share, num in ((0.1, 1), (0.3, 4), (0.5, 6), (0.9, 11)):
        assert len(names_of(frames, "val", val_fraction=share)) == num, "of 12 images, close to the share"
    assert len(names_of(frames, "val", val_fraction=0.3, groups="{group}_*")) == 3, "one of four groups"


def test_folds_are_equal_parts_and_groups_stay_together(frames):
    parts = [names_of(frames, "val", folds=5, fold=fold, groups="{group}_*") for fold in range(5)]
    assert [len(part) for part in parts] == [12] * 5
    assert set().union(*parts) == names_of(frames, "train", folds=5, groups="{group}_*") | parts[0]
    for part in parts:
        videos = {name.rpartition("_")[0] for name in part}
        assert all(f"{video}_{frame}" in part for video in videos for frame in range(3))


def test_further_images_move_few_of_the_others_between_folds(frames):
    before = [names_of(frames, "train", folds=5, fold=fold) for fold in range(5)]
    for number in (60, 61):
        place = frames / "photos" / f"late_{number}"
        save(place.with_suffix(".png"), np.zeros((8, 8, 3), np.uint8))
        save(place.with_name(place.name + "_mask.png"), np.zeros((8, 8), np.uint8))
    for fold, trained in enumerate(before):
        assert len(names_of(frames, "val", folds=5, fold=fold) & trained) <= 2


def test_the_held_out_images_are_independent_of_val_and_keep_groups(frames, small):
    config = configured(small, frames, **FOLDERS, val_fraction=0.3, groups="{group}_*")
    dataset = replace(config.dataset, holdout=0.3)
    train, held, val = (
        {sample.name.rpartition("_")[0] for sample in open_split(dataset, split).samples}
        for split in ("train", "holdout", "val")
    )
    assert min(map(len, (train, held, val))) > 0
    assert (train & held, train & val, held & val) == (set(), set(), set())


def test_check_says_which_class_a_fold_lacks(frames, small):
    report = check(configured(small, frames, **FOLDERS, folds=20, groups="{group}_*"), rehearses=False)
    assert any("has no pixel of tool" in finding.text for finding in report.findings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.2}, r"val_fraction is 1.2, but is a share of the images from 0 to 1: set dataset.reader"),
        ({"val_fraction": 0.0001}, r"val_fraction=0.0001 puts none of 60 images \(60 groups\) into val: set"),
        (
            {"fold": 2},  # of a sweep over fold, say: each job would train the same
            r"has folds=0, fold=2 and val_fraction=0.0, but takes two folds or more",
        ),
        (
            {"folds": 5, "fold": 5},
            r"has folds=5, fold=5 and val_fraction=0.0, but takes two folds or more, a fold from",
        ),
        (
            {"folds": 5, "val_fraction": 0.1},
            r"and no val_fraction then: set dataset.reader.folds=5 dataset.reader.fold=0",
        ),
        ({"folds": 5, "groups": "x"}, r"groups is 'x', but must have \{group\} once, and \* at most twice: set"),
        ({"folds": 5, "groups": "{group}/*"}, r"image 'video_0_0' does not fit dataset.reader.groups='\{group\}/\*'"),
        (
            {},
            r"split 'train' of .* does not exist: .* set dataset.reader.val_fraction=0.2 to cut val out of all images",
        ),
    ],
)
def test_bad_cuts_are_refused(frames, options, message):
    with pytest.raises(InputError, match=message):
        names_of(frames, "train", **options)


def test_a_val_split_that_is_there_is_not_cut_again(tmp_path):
    make(tmp_path, "png")
    with pytest.raises(InputError, match=r"has a split val already, but val_fraction or folds would cut another one"):
        open_dataset("folder", root=tmp_path, split="train", val_fraction=0.5)
