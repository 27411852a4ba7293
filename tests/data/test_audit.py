"""The audit of a split against files that were damaged on purpose, and against plain readings of whole ones."""

from __future__ import annotations

from collections import Counter
from functools import partial

import cv2
import numpy as np
import pytest
from PIL import Image

from segkit.check.audit import SplitAudit, audit_split
from segkit.check.findings import (
    ERROR,
    NOTE,
    WARNING,
    overlap_findings,
    published_count,
    split_findings,
    summary,
)
from segkit.data import open_dataset
from segkit.data.labels import ranges
from segkit.data.layout import collecting
from segkit.data.statistics import raw_histogram
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample

NUM_IMAGES = 6


@pytest.fixture
def root(tmp_path):
    return make_sample("camvid", tmp_path / "CamVid", num_images=NUM_IMAGES, scale=0.1)


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("Insufficient memory (Failed to allocate 99 bytes)")])
def test_too_little_memory_is_no_fault_of_a_file(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    root = make_sample("ade20k", tmp_path / "ade20k", num_images=1, scale=0.1)
    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(type(error)):
        audit_split(open_dataset("ade20k", root=root, split="train"))


def audit(root, split="train", **options):
    return audit_split(open_dataset("camvid", root=root, split=split), **options)


def findings_of(found, *, validates=False):
    return list(split_findings(found, validates=validates))


def label_of(root, number):
    return root / "trainannot" / f"train_{number:05d}.png"


def image_of(root, number):
    return root / "train" / f"train_{number:05d}.png"


def change_label(path, change):
    pixels = np.array(Image.open(path))
    change(pixels)
    Image.fromarray(pixels).save(path)


# -- whole files -----------------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_plain_reading(root):
    found = audit(root)
    raw = Counter()
    images = np.zeros(11, np.int64)
    for path in sorted((root / "trainannot").iterdir()):
        pixels = np.array(Image.open(path)).ravel().tolist()
        raw.update(pixels)
        images += [k in pixels for k in range(11)]
    assert found.raw_pixels == raw
    np.testing.assert_array_equal(found.class_pixels, [raw[k] for k in range(11)])
    np.testing.assert_array_equal(found.class_images, images)
    assert found.ignored_pixels == raw[11]
    assert found.sizes == {(36, 48): NUM_IMAGES}
    assert found.is_complete
    assert found.broken == set()
    assert found.usable() == list(range(NUM_IMAGES))
    assert findings_of(found) == []


def test_processes_see_what_one_process_sees(root):
    label_of(root, 2).write_bytes(b"")
    one, several = audit(root), audit(root, workers=2)
    assert summary(one) == summary(several)
    assert findings_of(one) == findings_of(several)


def test_a_sample_is_drawn_by_the_seed_and_says_what_it_cannot_know(root):
    some = audit(root, sample=2, seed=3)
    assert some.indices == audit(root, sample=2, seed=3).indices == sorted(some.indices)
    assert len(some.indices) == sum(some.sizes.values()) == 2
    assert not some.is_complete
    assert len({tuple(audit(root, sample=2, seed=seed).indices) for seed in range(8)}) > 1
    assert audit(root, sample=99).is_complete
    (finding,) = findings_of(some)
    assert finding.level == NOTE
    assert "show no pixel of" in finding.text
    assert "--sample" in finding.text


# -- damaged files ---------------------------------------------------------------------------------------------------


def test_labels_of_grey_values_are_a_few_findings_and_not_one_a_value(root):
    change_label(label_of(root, 3), lambda pixels: pixels.__setitem__((0, slice(0, 30)), range(100, 130)))
    found = audit(root)
    errors = [finding for finding in findings_of(found) if finding.level == ERROR]
    assert len(errors) == 6
    assert "has 1 pixels of the raw value 100, which the label table of camvid does not know" in errors[0].text
    assert "have 25 more raw values that the table does not know, from 105 to 129, for example" in errors[-1].text
    assert errors[-1].files == (str(label_of(root, 3)),)
    assert sum(row["train"] is None for row in summary(found)["raw_values"]) == 30


def test_all_problems_are_collected(root):
    whole = image_of(root, 0).read_bytes()
    image_of(root, 0).write_bytes(whole[: len(whole) // 2])
    label_of(root, 1).write_bytes(b"")
    Image.fromarray(np.zeros((36, 50, 3), np.uint8) + np.arange(50, dtype=np.uint8)[:, None]).save(image_of(root, 2))
    change_label(label_of(root, 3), lambda pixels: pixels.__setitem__((0, slice(0, 7)), 77))
    change_label(label_of(root, 4), lambda pixels: pixels.__setitem__((0, slice(0, 9)), 77))
    Image.fromarray(np.full((36, 48, 3), 9, np.uint8)).save(image_of(root, 5))
    found = audit(root)
    errors = {finding.text: finding for finding in findings_of(found) if finding.level == ERROR}
    texts = "\n".join(errors)
    assert f"{image_of(root, 0)} is damaged" in texts
    assert f"label {label_of(root, 1)} is empty (0 bytes)" in texts
    assert f"image {image_of(root, 2)} is 50x36 but its label {label_of(root, 2)} is 48x36" in texts
    assert (
        f"{label_of(root, 4)} has 9 pixels of the raw value 77 (2 labels of train hold it, 16 pixels in all)" in texts
    )
    assert "allowed are 0..11" in texts
    assert len(errors) == 4
    unknown = next(finding for text, finding in errors.items() if "77" in text)
    assert set(unknown.files) == {str(label_of(root, 3)), str(label_of(root, 4))}
    assert found.broken == {0, 1, 2, 3, 4}
    assert found.usable() == [5]
    warnings = [finding.text for finding in findings_of(found) if finding.level == WARNING]
    assert [text for text in warnings if f"image {image_of(root, 5)} shows one colour only" in text]
    assert summary(found)["num_broken"] == 5


def test_values_of_12_bits_in_16_are_a_warning(root):
    """Of which the upper byte, that is read, says little."""
    for number in range(6):
        image = np.random.default_rng(number).integers(0, 4096, (36, 48)).astype(np.uint16)
        Image.fromarray(image).save(image_of(root, number))
    texts = [finding.text for finding in findings_of(audit(root)) if finding.level == WARNING]
    assert [text for text in texts if "no image of split train has a value above 15 of 255: where files" in text]


def test_an_image_that_does_not_decode_still_has_a_size(root):
    whole = image_of(root, 0).read_bytes()
    image_of(root, 0).write_bytes(whole[: len(whole) // 2])
    change_label(label_of(root, 0), lambda pixels: None)
    Image.fromarray(np.zeros((30, 48), np.uint8)).save(label_of(root, 0))
    texts = [finding.text for finding in findings_of(audit(root)) if finding.level == ERROR]
    assert any("is damaged" in text for text in texts)
    assert any("is 48x36 but its label" in text for text in texts)


def test_many_problems_of_one_kind_are_counted(root):
    root = make_sample("camvid", root.parent / "more", num_images=8, scale=0.1)
    for number in range(8):
        label_of(root, number).write_bytes(b"")
    found = audit(root)
    errors = [finding for finding in findings_of(found) if finding.level == ERROR]
    assert len(errors) == 6
    assert errors[-1].text == (
        f"split train has 3 more labels that cannot be read, for example {label_of(root, 5)}: mend them likewise "
        "(--json lists them all)"
    )
    assert {file for finding in errors for file in finding.files} == {str(label_of(root, k)) for k in range(8)}
    assert found.usable() == []


def test_a_label_without_any_class_and_a_copied_image(root):
    Image.fromarray(np.full((36, 48), 11, np.uint8)).save(label_of(root, 1))
    Image.open(image_of(root, 2)).save(image_of(root, 3), compress_level=1)
    assert image_of(root, 2).read_bytes() != image_of(root, 3).read_bytes()
    texts = [finding.text for finding in findings_of(audit(root)) if finding.level == WARNING]
    assert any(f"label {label_of(root, 1)} has no pixel of any class" in text for text in texts)
    assert any(f"{image_of(root, 2)} and {image_of(root, 3)}" in text and "more than once" in text for text in texts)


def test_an_error_that_no_reader_foresaw_names_the_file(root, monkeypatch):
    monkeypatch.setattr(_fail_on, "__module__", "segkit.data.readers.camvid")
    dataset = open_dataset("camvid", root=root, split="train")
    dataset.load_label = partial(_fail_on, dataset.samples[2].name, dataset.load_label)
    found = audit_split(dataset)
    (finding,) = [finding for finding in findings_of(found) if finding.level == ERROR]
    assert finding.text == f"{label_of(root, 2)} cannot be read (TypeError: not a mapping); unpack it again"


def _fail_on(name, load, sample):
    if sample.name == name:
        raise TypeError("not a mapping\nsecond line")
    return load(sample)


# -- classes, counts, splits -----------------------------------------------------------------------------------------


def without_class(root, split, raw):
    for path in (root / f"{split}annot").iterdir():
        change_label(path, lambda pixels: pixels.__setitem__(pixels == raw, 11))


def test_classes_without_pixels(root):
    without_class(root, "train", 8)
    without_class(root, "val", 8)
    without_class(root, "val", 9)
    (train,) = findings_of(audit(root))
    assert train.level == WARNING
    assert "split train has no pixel of Car, which cannot be learnt, and a loss with margins" in train.text
    assert "loss.absent" in train.text
    (val,) = findings_of(audit(root, "val"), validates=True)
    assert "split val has no pixel of Car, Pedestrian, so the mean IoU is over the other classes (9) and" in val.text


def test_a_split_without_labels_is_an_error(tmp_path):
    root = make_sample("cityscapes", tmp_path / "cityscapes", num_images=2, scale=0.05)
    found = audit_split(open_dataset("cityscapes", root=root, split="test"))
    errors = [finding.text for finding in findings_of(found) if finding.level == ERROR]
    assert len(errors) == 1
    assert "split 'test' of cityscapes has no labels" in errors[0]
    assert "dataset.val_split" in errors[0]


def test_published_counts():
    def fake(name, split, splits, num):
        table = type("Table", (), {"splits": splits})
        return type("Set", (), {"name": name, "split": split, "table": table, "__len__": lambda self: num})()

    splits = {"train": 1200}
    assert published_count(fake("robotic_instrument", "train", splits, 8), {"splits": "paper"}) == 1200
    assert published_count(fake("robotic_instrument", "train", splits, 8), {"splits": "sequence"}) is None
    assert published_count(fake("synthetic", "train", splits, 8), {"num_images": 8}) is None
    assert published_count(fake("folder", "train", {}, 8), {}) is None


@pytest.mark.parametrize(
    ("num", "published", "says"),
    [
        (6, 6, None),
        (6, None, None),
        (6, 367, "has only 6 images, but 367 are published"),
        (6, 5, "has 6 images, but 5"),
    ],
)
def test_counts_beside_the_published_ones(root, num, published, says):
    seen = audit(root)
    seen.published = published
    found = list(split_findings(seen, validates=False))
    assert [finding.level for finding in found] == ([] if says is None else [WARNING])
    assert says is None or says in found[0].text


def test_pairs_that_the_reader_leaves_out_are_not_missing(tmp_path):
    root = make_sample("bdd100k", tmp_path / "bdd100k", num_images=4, scale=0.05)
    found = audit_split(open_dataset("bdd100k", root=root, split="train"))
    found.published = len(found.dataset) + 4
    counted = [f.text for f in split_findings(found, validates=False)]
    assert not any("published" in text for text in counted)
    assert any(text.startswith("skipped ") for text in counted)  # the reader's note
    found.published = 7000
    missing = [f.text for f in split_findings(found, validates=False) if f.level == WARNING]
    assert "6,996 are published" in missing[0]


def test_overlap_is_found_by_content(root):
    Image.open(root / "val" / "val_00000.png").save(image_of(root, 4), compress_level=1)
    (finding,) = overlap_findings(audit(root), audit(root, "val"))
    assert finding.level == ERROR
    assert f"1 of 3 images of split val are in train as well, for example {root / 'val' / 'val_00000.png'} = " in (
        finding.text
    )
    assert f"= {image_of(root, 4)}: remove" in finding.text
    assert finding.files == (str(root / "val" / "val_00000.png"),)


def test_no_overlap(root):
    assert not list(overlap_findings(audit(root), audit(root, "val")))


def test_a_few_shared_images_of_a_published_split_are_a_warning(root):
    dataset = open_dataset("camvid", root=root, split="train")
    train, val = SplitAudit(dataset, list(range(6))), SplitAudit(dataset, list(range(200)))
    train.digests, val.digests = {"a": [0]}, {"a": [5]}
    (finding,) = overlap_findings(train, val)
    assert finding.level == WARNING


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_raw_histogram_equals_unique(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 30, (17, 23)).astype(dtype)
    values, counts = np.unique(raw, return_counts=True)
    assert raw_histogram(raw) == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_raw_histogram_of_values_beyond_a_byte():
    assert raw_histogram(np.array([[-1, 300], [300, 0]])) == {-1: 1, 0: 1, 300: 2}
    assert raw_histogram(np.zeros((0, 4), np.int64)) == {}


def test_images_with_an_orientation_tag_are_counted(root):
    for number in (1, 4):
        exif = Image.Exif()
        exif[274] = 6
        with Image.open(image_of(root, number)) as image:
            image.load()
        image.save(image_of(root, number), exif=exif)
    found = audit(root)
    assert found.turned == [1, 4]
    assert found.broken == set()
    (finding,) = [finding for finding in findings_of(found) if "orientation" in finding.text]
    assert finding.level == NOTE
    assert finding.text.startswith(
        f"2 of {NUM_IMAGES} images of split train have an orientation tag, for example {image_of(root, 1)}: it is"
    )
    assert finding.files == (str(image_of(root, 1)), str(image_of(root, 4)))
    assert summary(found)["num_with_orientation"] == 2


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0..2, 5, 7..8"
    assert ranges([255]) == "255"


def test_collecting_leaves_out_what_a_reader_refuses(root):
    label_of(root, 1).unlink()
    image_of(root, 2).unlink()
    with pytest.raises(InputError, match=r"lists label .*train_00001.png, which does not exist"):
        open_dataset("camvid", root=root, split="train")
    with collecting() as errors:
        dataset = open_dataset("camvid", root=root, split="train")
    assert len(dataset) == NUM_IMAGES - 2
    assert len(errors) == 2
    assert "image" in str(errors[1])
    with pytest.raises(InputError):  # the context is closed
        open_dataset("camvid", root=root, split="train")


@pytest.mark.parametrize(
    "name", ["voc", "ade20k", "cocostuff10k", "bdd100k", "mapillary", "robotic_instrument", "folder"]
)
def test_every_reader_collects(name, tmp_path):
    root = make_sample(name, tmp_path / name, num_images=3, scale=0.05)
    whole = open_dataset(name, root=root, split="train")
    whole.samples[0].labels[-1].unlink()
    whole.samples[1].image.unlink()
    with pytest.raises(InputError):
        open_dataset(name, root=root, split="train")
    with collecting() as errors:
        rest = open_dataset(name, root=root, split="train")
    lost = {whole.samples[0].name, whole.samples[1].name}
    assert {s.name for s in rest.samples} == {s.name for s in whole.samples} - lost
    assert len(errors) == 2


@pytest.mark.data
def test_camvid_as_published(shared_data):
    audits = {split: audit(shared_data / "CamVid", split, workers=2) for split in ("train", "val")}
    for split, found in audits.items():
        table = found.dataset.table
        assert len(found.dataset) == published_count(found.dataset, {}) == table.splits[split]
        found.published = published_count(found.dataset, {})
        assert not list(split_findings(found, validates=split == "val"))
        assert found.sizes == {(360, 480): len(found.dataset)}
    assert not list(overlap_findings(audits["train"], audits["val"]))
    shares = audits["train"].class_pixels / audits["train"].class_pixels.sum() * 100
    published_shares = [17.54, 24.21, 1.02, 32.96, 4.67, 10.12, 1.22, 1.17, 6.11, 0.67, 0.30]
    np.testing.assert_allclose(shares, published_shares, atol=0.006)
