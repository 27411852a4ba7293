"""``segkit browse``: the crops are those of the trainer, the shares those of their labels, and the page is offline."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from segkit.cli import verb_function
from segkit.config.compose import compose
from segkit.data.loader import train_batches
from segkit.errors import InputError
from segkit.run.batches import PhaseBatches
from segkit.run.build import train_transform
from segkit.run.plan import plan_phase
from segkit.run.splits import open_phases

LINES = ["dataset=synthetic", "dataset.reader.num_images=8", "schedule=single", "augment=strong", "workers=0"]


@pytest.fixture
def page(tmp_path):
    def write(*arguments):
        verb_function("browse")([*LINES, *arguments, "--output", str(tmp_path / "page.html")])
        return (tmp_path / "page.html").read_text()

    return write


def test_the_page_shows_what_the_trainer_sees(page):
    config = compose(LINES)
    splits = open_phases(config)["train"]
    text = page("--n", "3")
    batches = train_batches(
        splits.train, transform=train_transform(config, "train", augment=True), batch_size=3,
        seed=0, phase="train", start_step=0, num_steps=1,
    )  # fmt: skip
    (batch,) = batches
    names = re.findall(r"<h3>(.*?)</h3>", text)
    assert names == batch.names
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]*)" alt="(\S+), augmented"', text)
    for (data, name), image in zip(pictures, batch.images, strict=True):
        assert name in batch.names
        expected = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(expected, "JPEG", quality=82)
        assert base64.b64decode(data) == expected.getvalue()
    share = 100 * float((batch.labels[0] == 0).float().mean())
    assert f"road <b>{share:.2f} %</b>" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text), "nothing is loaded from elsewhere"
    crops = PhaseBatches(
        config=config, plan=plan_phase(config, "train", 8), splits=splits, pin_memory=False
    ).first_crops(2)
    for (image, label), other, target in zip(crops, batch.images, batch.labels, strict=False):
        np.testing.assert_array_equal(image, other.permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(label, target.numpy())


def test_rare_classes_come_first(page):
    data = open_phases(compose(LINES))["train"].train
    pixels = np.stack([np.bincount(item.label.ravel(), minlength=256)[:8] for item in data])
    rarest = min((k for k in range(8) if pixels[:, k].any()), key=lambda k: pixels[:, k].sum())
    assert (
        re.search(r"<h3>(.*?)</h3>", page("--rare-first", "--n", "2"))[1]
        == data.samples[pixels[:, rarest].argmax()].name
    )


def test_names_are_text_and_bad_numbers_are_refused(page, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "own" / kind / "train").mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "own" / kind / "train" / "<b>x.png")
    (tmp_path / "own" / "classes.yaml").write_text("names: ['<script>alert(1)</script>', b]")
    verb_function("browse")(
        ["dataset=folder", f"dataset.root={tmp_path / 'own'}", "--output", str(tmp_path / "own.html")]
    )
    text = (tmp_path / "own.html").read_text()
    assert "&lt;b&gt;x" in text
    assert "<script>alert" not in text
    for verb, option, name in (("browse", "--output", "classes.yaml"), ("stats", "--plot", "images/train/new.png")):
        with pytest.raises(
            InputError, match=rf"{option} is .*{name}, within the data in .*own, which stay as they are"
        ):
            verb_function(verb)(
                ["dataset=folder", f"dataset.root={tmp_path / 'own'}", option, f"{tmp_path}/own/{name}"]
            )
    Image.fromarray(np.full((40, 40), 255, np.uint8)).save(tmp_path / "own" / "labels" / "train" / "<b>x.png")
    with pytest.raises(InputError, match="no pixel of split train is of a class, so that none is rare"):
        verb_function("browse")(
            [
                "dataset=folder",
                f"dataset.root={tmp_path / 'own'}",
                "workers=0",
                "--rare-first",
                f"--output={tmp_path}/x",
            ]
        )
    with pytest.raises(InputError, match="--n: '0' is no whole number from 1 to 1000"):
        page("--n", "0")
