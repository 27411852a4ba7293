"""Mapillary Vistas 1.2: config.json, both layouts, version 2.0, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.data.labels import table_file
from segkit.data.readers.mapillary import check_config
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample


@pytest.fixture
def root(tmp_path):
    return make_sample("mapillary", tmp_path / "vistas", num_images=4)


def to_nested_layout(root):
    """Rearrange the sample as the archive of version 2.0 unpacks its v1.2 part."""
    for folder in ("training", "validation"):
        (root / folder / "v1.2").mkdir()
        for kind in ("labels", "instances"):
            (root / folder / kind).rename(root / folder / "v1.2" / kind)
        (root / folder / "v2.0" / "labels").mkdir(parents=True)
    (root / "config.json").rename(root / "config_v1.2.json")
    (root / "config_v2.0.json").write_text(json.dumps({"version": "2.0", "labels": [{}] * 124}))
    return root


def rewrite(root, change):
    path = root / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("nested", [False, True])
def test_labels_are_palette_indices_and_unlabeled_is_ignored(root, nested):
    folders = {"train": "training", "val": "validation"}
    if nested:
        to_nested_layout(root)
    for split, num in (("train", 4), ("val", 2)):
        data = open_dataset("mapillary", root=root, split=split)
        assert len(data) == num
        for item in data:
            folder = root / folders[split] / ("v1.2/labels" if nested else "labels")
            with Image.open(folder / f"{item.name}.png") as mask:
                assert mask.mode == "P"
                raw = np.array(mask)
                colour = np.array(mask.convert("RGB"))
            assert 65 in raw
            np.testing.assert_array_equal(item.label, np.where(raw == 65, 255, raw))
            colours = np.array([entry["color"] for entry in table_file("mapillary")["config_labels"]])
            np.testing.assert_array_equal(colour, colours[raw])
    assert not open_dataset("mapillary", root=root, split="test").labelled


def test_keys_may_begin_with_any_character(root):
    names = [sample.name for sample in open_dataset("mapillary", root=root, split="train").samples]
    assert any(name.startswith("-") for name in names)
    assert any(name.startswith("_") for name in names)
    assert all(len(name) == 22 for name in names)


def test_instances_agree_with_labels(root):
    for path in (root / "training" / "instances").iterdir():
        instances = np.array(Image.open(path))
        assert instances.dtype == np.uint16
        np.testing.assert_array_equal(instances // 256, np.array(Image.open(root / "training/labels" / path.name)))


def test_66_labels_of_which_65_are_evaluated():
    labels = table_file("mapillary")["config_labels"]
    assert len(labels) == 66
    assert [entry["evaluate"] for entry in labels] == [True] * 65 + [False]
    assert labels[63]["name"] == "void--car-mount"
    assert sum(entry["instances"] for entry in labels) == 37


def swap(config):
    labels = config["labels"]
    labels[3], labels[4] = labels[4], labels[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version="2.0"), r"is of version 2.0, whose labels differ"),
        (lambda c: c.update(version=2.0), r"is of version 2.0, whose labels differ"),
        (lambda c: c.update(labels=c["labels"] * 2), r"lists 132 labels, but version 1.2 has 66"),
        (lambda c: c["labels"].pop(), r"lists 65 labels, but version 1.2 has 66"),
        (swap, r"has name='construction--barrier--guard-rail' for label 3, but version 1.2 has 'constr"),
        (lambda c: c["labels"][0].update(color=[1, 2, 3]), r"has color=\[1, 2, 3\] for label 0"),
        (lambda c: c["labels"][65].update(evaluate=True), r"has evaluate=True for label 65"),
        (lambda c: c["labels"][9].pop("readable"), r"has readable=None for label 9"),
        (lambda c: c.pop("labels"), r"is no JSON file with a list named labels"),
    ],
)
def test_another_config_is_refused(root, change, message):
    rewrite(root, change)
    with pytest.raises(InputError, match=message):
        open_dataset("mapillary", root=root, split="train")


@pytest.mark.parametrize("version", ["1.1", "1.2", 1.2, None])
def test_any_first_version_with_the_right_labels_will_do(root, version):
    rewrite(root, lambda config: config.update(version=version))
    assert len(open_dataset("mapillary", root=root, split="val")) == 2


def test_version_two_alone_is_refused(root):
    to_nested_layout(root)
    shutil.rmtree(root / "training" / "v1.2")
    with pytest.raises(InputError, match=r"has labels of version 2.0 only"):
        open_dataset("mapillary", root=root, split="train")
    (root / "config_v1.2.json").unlink()
    with pytest.raises(InputError, match=r"config_v2.0.json is of version 2.0, whose labels differ"):
        open_dataset("mapillary", root=root, split="val")


def test_a_missing_or_broken_config_is_named(root, tmp_path):
    (root / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"is no JSON file"):
        open_dataset("mapillary", root=root, split="train")
    (root / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json does not exist, without which label values have no meaning"):
        open_dataset("mapillary", root=root, split="train")
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match=r"is no JSON file with a list named labels"):
        check_config(path)


def test_pairs_and_levels(root):
    path = sorted((root / "training" / "labels").iterdir())[0]
    path.rename(root / "elsewhere.png")
    with pytest.raises(InputError, match=rf"{path.stem}.jpg of mapillary has no label"):
        open_dataset("mapillary", root=root, split="train")
    (root / "elsewhere.png").rename(path)
    (root / "training" / "images" / f"{path.stem}.jpg").unlink()
    with pytest.raises(InputError, match=rf"label .*{path.stem}.png of mapillary has no image"):
        open_dataset("mapillary", root=root, split="train")
    with pytest.raises(InputError, match=rf"is too deep for mapillary.*set dataset.root={root}$"):
        open_dataset("mapillary", root=root / "training", split="val")
    with pytest.raises(InputError, match=rf"is one level too shallow for mapillary.*set dataset.root={root}$"):
        open_dataset("mapillary", root=root.parent, split="val")
    shutil.rmtree(root / "validation" / "labels")
    with pytest.raises(InputError, match=r"validation/labels does not exist; unpack mapillary-vistas-dataset"):
        open_dataset("mapillary", root=root, split="val")


def test_unknown_values_and_instance_files_are_named(root):
    data = open_dataset("mapillary", root=root, split="train")
    path = data.samples[0].labels[0]
    raw = np.array(Image.open(path))
    shutil.copy(root / "training" / "instances" / path.name, path)
    with pytest.raises(InputError, match=r"has 16 or more bits per pixel .* it may be an instance file"):
        data.label(0)
    raw[0, 0] = 66
    Image.fromarray(raw).save(path)
    with pytest.raises(InputError, match=r"66 \(1 pixels\); allowed are 0\.\.65"):
        data.label(0)
