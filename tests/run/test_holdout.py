"""dataset.holdout: training images that are kept out of training by a hash of their names."""

from __future__ import annotations

import pytest

from segkit.config.compose import compose
from segkit.data.statistics import count_labels, fingerprint
from segkit.errors import InputError
from segkit.run.splits import is_held_out, open_phases, open_split


def dataset(num_images=40, holdout=0.25, **options):
    extra = [f"dataset.{key}={value}" for key, value in options.items()]
    size = ["dataset.reader.size=[64,64]", f"dataset.reader.num_images={num_images}"]
    return compose(["dataset=synthetic", f"dataset.holdout={holdout}", *size, *extra]).dataset


def names(split):
    return [sample.name for sample in split.samples]


def test_disjoint_and_complete_and_in_order():
    train, held, whole = (
        open_split(dataset(), "train"),
        open_split(dataset(), "holdout"),
        open_split(dataset(holdout=0), "train"),
    )
    assert sorted(names(train) + names(held)) == names(whole)
    assert names(train) == sorted(names(train))
    assert 4 <= len(held) <= 16
    assert (train.split, held.split) == ("train", "holdout")
    assert len(open_split(dataset(), "val")) == 40


def test_other_images_change_nothing():
    few, many = open_split(dataset(num_images=40), "holdout"), open_split(dataset(num_images=90), "holdout")
    whole = names(open_split(dataset(holdout=0), "train"))
    assert names(few) == [name for name in names(many) if name in whole]
    assert set(names(few)) <= set(names(open_split(dataset(holdout=0.5), "holdout")))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_share_is_about_right(share):
    found = sum(is_held_out(f"seq/{number:06d} é", share) for number in range(20000)) / 20000
    assert found == pytest.approx(share, abs=4 * (share * (1 - share) / 20000) ** 0.5)


def test_counts_and_fingerprints_follow():
    train, held, whole = (
        open_split(dataset(), "train"),
        open_split(dataset(), "holdout"),
        open_split(dataset(holdout=0), "train"),
    )
    counts = [count_labels(split, workers=0) for split in (train, held, whole)]
    assert (counts[0].class_pixels + counts[1].class_pixels).tolist() == counts[2].class_pixels.tolist()
    assert len({fingerprint(split) for split in (train, held, whole)}) == 3


def test_phases_train_without_them():
    config = compose(["dataset=synthetic", "dataset.holdout=0.25", "dataset.reader.num_images=40"])
    pair = next(iter(open_phases(config).values()))
    assert names(pair.train) == names(open_split(config.dataset, "train"))
    assert len(pair.train) < len(pair.val) == 40


def test_refusals():
    with pytest.raises(
        InputError, match=r"dataset\.holdout is 0\.6, but is a share of the training images from 0 to 0\.5"
    ):
        dataset(holdout=0.6)
    with pytest.raises(InputError, match=r"keeps none of the 2 images of train out of training, .*another share"):
        open_split(dataset(num_images=2, holdout=0.001), "train")
    with pytest.raises(
        InputError, match=r"no training images were held out, dataset\.holdout is 0: train with.*has no split 'holdout'"
    ):
        open_split(dataset(holdout=0), "holdout")
