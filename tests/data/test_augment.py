"""Transforms of Albumentations behind the crop: pure in the seed, true to labels, and refused where they do not fit."""

import random
import re
import warnings

import numpy as np
import pytest
from crops import drawn_crop

from segkit.config.compose import compose
from segkit.config.dataset import DatasetConfig
from segkit.config.schema import check_targets
from segkit.config.targets import GROUPS
from segkit.data.loader import train_batches
from segkit.data.transforms import PAD_COLOUR, TrainTransform
from segkit.errors import InputError
from segkit.run.build import build_augment, check_parts, train_transform
from segkit.run.splits import open_phases, open_split

CROP = (32, 32)
RGB = DatasetConfig(name="rgb", reader={})
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (*CROP, 3), np.uint8)
LABEL = RNG.integers(0, 3, CROP, np.uint8)


def augment(crop=CROP, **nodes):
    named = {name: {**node, "_target_": f"albumentations.{node['_target_']}"} for name, node in nodes.items()}
    return build_augment(named, crop=crop, images=RGB)


@pytest.mark.parametrize("target", sorted(GROUPS["augment"].permitted))
def test_every_permitted_transform_is_pure_in_its_seed_and_keeps_sizes_and_classes(target):
    """Global generators neither change what it does, nor are they moved; no label is invented."""
    made = [augment(x={"_target_": target.removeprefix("albumentations."), "p": 1.0}) for _ in range(2)]
    seen = []
    for number, transform in enumerate(made):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        image, label = IMAGE.copy(), LABEL.copy()
        first = transform(image, label, 5)
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002
        np.testing.assert_array_equal(image, IMAGE)
        np.testing.assert_array_equal(label, LABEL)
        transform(IMAGE, LABEL, 6)
        for one, other in zip(first, transform(IMAGE, LABEL, 5), strict=True):
            np.testing.assert_array_equal(one, other)
        seen.append(first)
    (image, label), other = seen
    np.testing.assert_array_equal(image, other[0])
    np.testing.assert_array_equal(label, other[1])
    assert (image.shape, image.dtype, label.shape, label.dtype) == (IMAGE.shape, np.uint8, CROP, np.uint8)
    assert set(np.unique(label)) <= {0, 1, 2, 255}


def test_image_and_label_turn_together_and_the_corners_are_void():
    """A turn by 90 degrees, which every pixel can be followed through, and one by 45, whose corners come into view."""
    quarter = augment(turn={"_target_": "Rotate", "limit": [90, 90], "p": 1.0})
    image, label = quarter(np.repeat(LABEL[..., None], 3, 2), LABEL, 0)
    inner = slice(2, -2)
    np.testing.assert_array_equal(label[inner, inner], np.rot90(LABEL)[inner, inner])
    np.testing.assert_array_equal(image[..., 0][inner, inner], label[inner, inner])
    eighth = augment(turn={"_target_": "Rotate", "limit": [45, 45], "p": 1.0})
    image, label = eighth(IMAGE, LABEL, 0)
    assert label[0, 0] == label[-1, -1] == 255
    assert tuple(image[0, 0]) == PAD_COLOUR
    assert 255 not in label[12:20, 12:20]


def test_transforms_run_in_the_order_of_the_configuration_with_chances_of_their_own():
    """Each has its own generator: to add one leaves what the others do as it is."""
    flip = {"_target_": "HorizontalFlip", "p": 0.5}
    alone = augment(flip=flip)
    both = augment(flip=flip, invert={"_target_": "InvertImg", "p": 1.0})
    flipped = 0
    for seed in range(40):
        image, label = alone(IMAGE, LABEL, seed)
        flipped += not np.array_equal(label, LABEL)
        other = both(IMAGE, LABEL, seed)
        np.testing.assert_array_equal(other[0], 255 - image)
        np.testing.assert_array_equal(other[1], label)
    assert 10 < flipped < 30


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({"_target_": "CoarseDropout", "fill_mask": 3}, "fill_mask"),
        ({"_target_": "Rotate", "fill_mask": [3, 3, 3]}, "fill_mask"),
        ({"_target_": "PixelDropout", "mask_drop_value": 254}, "mask_drop_value"),
    ],
)
def test_labels_are_filled_with_classes_or_void(node, key):
    """Else the run would end at the step whose chance it is, of a label that no class has."""
    for value in (0, 2, 255):
        augment(x={**node, key: value}).check_fills(3)
    with pytest.raises(InputError, match=rf"augment.x.{key} is .*, but fills .* a class, 0 to 2, or 255 .*{key}=255$"):
        augment(x=node).check_fills(3)


def test_a_fill_that_is_no_class_is_refused_before_a_run():
    added = "+augment.x={_target_:albumentations.Rotate,fill_mask:8,p:0.01}"
    config = compose(["dataset.reader.num_images=2", added])
    with pytest.raises(InputError, match=r"augment.x.fill_mask is 8.0, but fills labels, so it is a class, 0 to 7, or"):
        check_parts(config, open_phases(config))


def test_all_transforms_of_colours_are_named_at_once():
    config = compose(["augment=strong", "dataset.dtype=uint16", "dataset.mean=[0,0,0]", "dataset.std=[1,1,1]"])
    wanted = r"augment.colour, augment.grey, augment.blur, augment.noise change colours of 8 bits.*: set (.*)"
    with pytest.raises(InputError, match=wanted) as caught:
        build_augment(config.augment, crop=CROP, images=config.dataset)
    nulls = re.search(wanted, str(caught.value))[1].split()
    build_augment(compose(["augment=strong", *nulls]).augment, crop=CROP, images=config.dataset)


@pytest.mark.parametrize("name", ["none", "light", "street", "aerial", "medical", "strong"])
def test_shipped_options_build_and_change_what_they_say(name):
    """Their keys are arguments that Albumentations takes without a warning, on crops that are no square."""
    config = compose(["dataset=synthetic", f"augment={name}", "dataset.reader.num_images=2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_targets(config)
        transform = train_transform(config, "finetune", augment=True)
    assert (transform.augment is None) == (name in ("none", "light"))
    assert (transform.flip, transform.color_jitter) == ((0.0, 0.0) if name == "none" else (0.5, 0.5))
    assert train_transform(config, "finetune", augment=False).augment is None
    if transform.augment:
        image = np.random.default_rng(0).integers(0, 256, (160, 224, 3), np.uint8)
        label = np.zeros((160, 224), np.uint8)
        results = [transform.augment(image, label, seed)[0] for seed in range(6)]
        assert any(not np.array_equal(result, image) for result in results)


def test_light_draws_as_if_there_were_no_augment():
    """The windows of a run without transforms are those of a run with them: the seed is drawn last."""
    plain = TrainTransform(crop=CROP, scale=(0.5, 2.0), flip=0.5, color_jitter=0.5)
    more = TrainTransform(
        crop=CROP, scale=(0.5, 2.0), flip=0.5, color_jitter=0.5, augment=augment(x={"_target_": "InvertImg", "p": 1.0})
    )
    for seed in range(10):
        ours, theirs = (drawn_crop(t, IMAGE, LABEL, np.random.default_rng(seed)) for t in (plain, more))
        np.testing.assert_array_equal(255 - ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_the_strengths_of_the_jitter_are_keys():
    config = compose(["dataset=synthetic", "dataset.jitter.brightness=0.5", "dataset.jitter.hue=0"])
    transform = train_transform(config, "finetune", augment=True)
    assert transform.jitter == {"brightness": 0.5, "contrast": 0.25, "saturation": 0.25, "hue": 0.0}
    drawn = [transform.draw((160, 224), np.random.default_rng(seed)).jitter for seed in range(200)]
    factors = [jitter["brightness"] for jitter in drawn if jitter]
    assert 0.5 <= min(factors) < 0.6 < 1.4 < max(factors) <= 1.5
    assert all(0.75 <= jitter["contrast"] <= 1.25 and jitter["hue"] == 0 for jitter in drawn if jitter)
    with pytest.raises(
        InputError, match=r"dataset.jitter.hue is 0.9, but is a strength from 0 to 0.5: set dataset.jit"
    ):
        compose(["dataset.jitter.hue=0.9"])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_with_any_number_of_workers_and_from_any_step(workers):
    config = compose(["dataset=synthetic", "augment=strong", "dataset.reader.num_images=6", "dataset.crop=[40,48]"])
    data = open_split(config.dataset, "train")
    options = {
        "transform": train_transform(config, "finetune", augment=True), "batch_size": 2, "seed": 1,
        "phase": "finetune", "num_steps": 6,
    }  # fmt: skip
    alone = list(train_batches(data, **options, start_step=0, workers=0))
    for start in (0, 4):
        for one, other in zip(
            alone[start:], train_batches(data, **options, start_step=start, workers=workers), strict=True
        ):
            assert (one.images == other.images).all()
            assert (one.labels == other.labels).all()
    assert (alone[0].images != alone[3].images).any(), "the same images of another epoch"


def test_a_transform_is_added_on_the_command_line():
    line = "+augment.rotate={_target_:albumentations.Rotate,limit:10,p:0.5}"
    assert list(compose([line]).augment) == ["rotate"]
    added = compose(["augment=street", line, "augment.shadow=null"])
    augmentation = build_augment(added.augment, crop=CROP, images=RGB)
    assert list(augmentation.transforms) == [
        f"augment.{name}" for name in ("turn", "light", "motion", "noise", "rotate")
    ]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("{_target_:albumentations.RandomCrop,height:8,width:8}",
         r"augment.x._target_ is 'albumentations.RandomCrop', but must be one of .*: .*the size of a crop is kept"),
        ("{_target_:albumentations.RandomSizedBBoxSafeCrop}", r"and boxes, other images and files are not at hand"),
        ("{_target_:albumentations.Lambda}", r"augment.x._target_ is 'albumentations.Lambda', but must be one of"),
        ("{_target_:albumentations.core.serialization.load}", r"but must be one of"),
        ("{_target_:os.system}", r"augment.x._target_ is 'os.system', but must be one of"),
        ("{_target_:torch.optim.SGD}", r"but must be one of"),
        ("{_target_:albumentations.Rotate,limits:10}", r"augment.x.limits is not an argument of albumentations.Rot"),
        ("{_target_:albumentations.Rotate,p:2}", r"albumentations.Rotate refuses its arguments \(.*less than or equal"),
        ("{_target_:albumentations.Rotate,p:often}", r"refuses its arg.* p Input should be a valid number, .*: corr"),
        ("{_target_:albumentations.Rotate,mask_interpolation:1}", r"augment.x mixes the classes of neighb"),
        ("{_target_:albumentations.Rotate,crop_border:true}",
         r"augment.x changes a crop of \[32, 48\] to \[\d+, \d+\], but all of a batch have one size: remove it"),
        ("{_target_:albumentations.RandomRotate90}", r"changes a crop of \[32, 48\] to \[48, 32\]"),
        ("3", r"augment.x is 3, but must name a transform: set 'augment.x=\{_target_:albumentations.Rotate"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(node, message):
    with pytest.raises(InputError, match=message):
        build_augment(compose([f"+augment.x={node}"]).augment, crop=(32, 48), images=RGB)
