"""Batches that cannot be trained on are refused before the first step, with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.run.build import build_model, check_batch, check_parts
from segkit.run.splits import open_phases

TINY = ("model=deeplabv3plus_tiny", "model.encoder_weights=none", "schedule=single", "dataset.crop=[32,32]")
NO_BATCH_NORM = (
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
    "schedule=single",
    "dataset.crop=[32,32]",
)


def check(*overrides, num_images=9, world_size=1, base=TINY):
    config = compose([*base, *overrides])
    check_batch(config, "train", build_model(config, 3), num_images=num_images, world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        (("batch_size=1",), {}, r"phase train has one image at a time, of which a batch norm .* larger batch_size"),
        (("batch_size=4", "accumulate=4"), {}, "one image at a time, of which .*, set a smaller accumulate, or"),
        (
            ("batch_size=2",),
            {"num_images": 1},
            r"one image .*, as there is only 1 image to train on, of which .*: add images, or choose",
        ),
        (("batch_size=2",), {"world_size": 2}, "one image at a time, of which a batch norm"),
        (
            ("batch_size=4", "accumulate=2"),
            {"num_images": 3},
            "batches of 3 images on a process, as there are only 3 images to train on, which cannot be cut into "
            "accumulate=2 equal parts: set accumulate to a divisor of 3",
        ),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_refused(overrides, options, sentence):
    with pytest.raises(InputError, match=sentence):
        check(*overrides, **options)


def test_other_batches_are_not():
    check("batch_size=2")
    check("batch_size=4", "accumulate=2")
    check("batch_size=2", "sync_batchnorm=true", world_size=2)
    check("batch_size=1", base=NO_BATCH_NORM)


def test_images_are_normalised_once():
    given = ("model.std=[1,1,1]", "dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.2,0.2,0.2]")
    config = compose([*TINY, *given, "dataset.reader.num_images=2", "dataset.reader.size=[64,64]"])
    with pytest.raises(
        InputError, match=r"model.std is \[1.*\] and dataset.std \[0.2, 0.2, 0.2\], but images are norm"
    ):
        check_parts(config, open_phases(config))


def test_one_class_is_no_segmentation(tmp_path):
    for folder in ("images/train", "images/val", "labels/train", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / folder / "a.png")
    (tmp_path / "classes.yaml").write_text("names: [tool]\n")
    config = compose(["dataset=folder", f"dataset.root={tmp_path}"])
    with pytest.raises(InputError, match=r"classes.yaml has one class, 'tool', but .* list the background as a class"):
        open_phases(config)
