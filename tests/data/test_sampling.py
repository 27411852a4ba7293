"""What an epoch draws: frequencies, purity, and crops that hold what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.data import Sample, SampleSet
from segkit.data.labels import load_table
from segkit.data.loader import train_batches
from segkit.data.sampling import make_sampler
from segkit.data.statistics import count_labels, counts_and_classes
from segkit.data.transforms import TrainTransform
from segkit.errors import InputError

RARE = {3: 5, 11: 6}
"""Sample -> the class of a spot of 6x6 pixels in it; class 7 is in samples 0 to 5, class 0 in all."""


def image_of(sample):
    return np.random.default_rng(int(sample.name)).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def label_of(sample):
    number, label = int(sample.name), np.zeros((60, 80), np.uint8)
    if number < 6:
        label[:, 40:] = 7
    if number in RARE:
        label[50:56, 3:9] = RARE[number]
    return label


def made(num=24):
    samples = [Sample(name=str(i), image=Path(str(i))) for i in range(num)]
    options = {"load_image": image_of, "load_label": label_of, "labelled": True}
    return SampleSet(samples, table=load_table("synthetic"), name="fake", split="train", **options)


HAS = np.zeros((24, 8), bool)
HAS[:, 0], HAS[:6, 7], HAS[3, 5], HAS[11, 6] = True, True, True, True
PIXELS = np.array([24 * 4800 - 6 * 2400 - 72, 0, 0, 0, 0, 36, 36, 6 * 2400 - 0])


def sampler(kind, chance=0.5):
    return make_sampler(kind, HAS, PIXELS, chance=chance)


def load(kind, **options):
    options = {"batch_size": 4, "seed": 1, "phase": "a", "start_step": 0, "num_steps": 14, **options}
    return list(
        train_batches(made(), transform=TrainTransform(crop=(16, 16), flip=0.5), sampler=sampler(kind), **options)
    )


def test_classes_of_images_are_counted_and_kept(tmp_path, monkeypatch):
    data = made()
    data.labelled = True
    monkeypatch.setattr("segkit.data.statistics.fingerprint", lambda data: "f" * 32)
    found = counts_and_classes(data, workers=0, cache_dir=tmp_path)[1]
    np.testing.assert_array_equal(found, HAS)
    (kept,) = (tmp_path / "label_counts").glob("*.npz")
    monkeypatch.setattr(data, "load_label", None)  # whoever counts again fails
    np.testing.assert_array_equal(counts_and_classes(data, workers=0, cache_dir=tmp_path)[1], HAS)
    assert count_labels(data, workers=0, cache_dir=tmp_path).class_images.tolist() == HAS.sum(0).tolist()
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(InputError, match="load_label fails"):
        counts_and_classes(data, workers=0, cache_dir=tmp_path)


@pytest.mark.parametrize("kind", ["class_balanced", "rare_crop"])
def test_frequencies_are_those_of_a_slow_calculation(kind):
    epochs, drawn = 3000, np.zeros(24)
    chosen = sampler(kind)
    for epoch in range(epochs):
        drawn += np.bincount(chosen.draws(seed=0, phase="a", epoch=epoch).indices, minlength=24)
    holders = {0: range(24), 5: [3], 6: [11], 7: range(6)}
    classes, share = ((0, 5, 6, 7), 1.0) if kind == "class_balanced" else ((5, 6), 0.5)
    expected = np.full(24, (1 - share) * epochs)
    for k in classes:
        for index in holders[k]:
            expected[index] += share * 24 * epochs / len(classes) / len(holders[k])
    assert np.abs(drawn - expected).max() < 5 * np.sqrt(expected.max())
    np.testing.assert_allclose(drawn, expected, rtol=0.1)


def test_a_rare_crop_holds_its_class():
    batches = load("rare_crop", num_steps=60)
    shares = []
    for batch in batches:
        for index, label in zip(batch.indices, batch.labels, strict=True):
            if index in RARE:
                shares.append(bool((label == RARE[index]).any()))
    drawn = sum(len(batch.indices) for batch in batches)
    assert len(shares) == pytest.approx(drawn * (0.5 + 0.5 / 12), rel=0.2)
    assert np.mean(shares) > 0.9, "all but the few that the permutation drew"
    uniform = [label for batch in load("class_balanced", num_steps=60) for label in batch.labels]
    assert np.mean([bool(((label == 5) | (label == 6)).any()) for label in uniform]) < 0.3


@pytest.mark.parametrize("kind", ["class_balanced", "rare_crop"])
def test_batches_are_pure_in_the_step(kind):
    whole = load(kind)
    for workers in (1, 3):
        for one, other in zip(whole, load(kind, workers=workers), strict=True):
            assert one.indices == other.indices
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
    for one, other in zip(whole[9:], load(kind, start_step=9), strict=True):
        assert torch.equal(one.images, other.images)
    ranks = [load(kind, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.images, batch.images[rank::2]), "ranks have disjoint rows of the batch"
    again = load(kind, seed=2)
    assert any(one.indices != other.indices for one, other in zip(whole, again, strict=True))


def test_one_class_has_no_rarer_one():
    with pytest.raises(InputError, match=r"dataset.sampler is rare_crop, but the labels have 1 of the classes, so th"):
        make_sampler("rare_crop", HAS[:, :1], PIXELS[:1], chance=0.5)
