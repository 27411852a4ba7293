"""Label counts against a slow loop, their cache, and their errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkit.data import Sample, SampleSet, open_dataset, statistics
from segkit.data.labels import table_from_dict
from segkit.data.statistics import LabelCounts, byte_histogram, count_labels, fingerprint
from segkit.errors import InputError

CONTENT = {
    "name": "toy",
    "classes": ["a", "b", "c"],
    "palette": [[0, 0, 0], [9, 9, 9], [5, 5, 5]],
    "raw_to_train": {"0": 255, "5": 0, "6": 1, "7": 1, "8": 2, "300": 2},
}
TABLE = table_from_dict(CONTENT)


def written(folder, num=6, *, table=TABLE, split="train", values=(0, 5, 6, 7)):
    """``num`` pairs of random labels as files; class c never occurs."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(num):
        image, label = folder / f"{i}.jpg", folder / f"{i}.png"
        if not label.exists():
            Image.fromarray(np.zeros((11, 17, 3), np.uint8)).save(image)
            Image.fromarray(rng.choice(values, (11, 17)).astype(np.uint8)).save(label)
        samples.append(Sample(name=str(i), image=image, labels=(label,)))
    return SampleSet(samples, table=table, name="toy", split=split)


def wide_label(sample, *, add=0):
    return np.array([[300, 5, 0], [6, 6, 300]], np.int32) + add


def loop(data):
    """Independent reference: every pixel of every label, one by one."""
    pixels, images, ignored = [0] * 3, [0] * 3, 0
    for item in data:
        seen = set()
        for value in item.label.ravel().tolist():
            if value == 255:
                ignored += 1
            else:
                pixels[value] += 1
                seen.add(value)
        for value in seen:
            images[value] += 1
    return pixels, images, ignored


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_counts_equal_a_loop_over_pixels(tmp_path, workers):
    data = written(tmp_path / "data")
    counts = count_labels(data, workers=workers)
    pixels, images, ignored = loop(data)
    assert counts.class_pixels.dtype == np.int64
    assert counts.class_pixels.tolist() == pixels
    assert counts.class_images.tolist() == images
    assert counts.class_pixels[2] == 0
    assert (counts.ignored_pixels, counts.num_images, counts.classes) == (ignored, 6, ("a", "b", "c"))


def test_labels_of_other_types(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "0.png")
    sample = Sample(name="0", image=tmp_path / "0.png", labels=(Path("0"),))
    data = SampleSet([sample], table=TABLE, name="toy", split="train", load_label=wide_label)
    pixels = sum(statistics.label_histogram(data, 0))
    assert pixels == 6
    assert statistics.label_histogram(data, 0)[[0, 1, 2, 255]].tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (64,), (33, 65), (128, 256)])
def test_byte_histogram_equals_bincount(shape):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    short, long = (
        np.repeat(noise.ravel(), rng.integers(1, most, noise.size))[: noise.size].reshape(shape) for most in (60, 900)
    )
    stripes = np.resize(np.arange(8, dtype=np.uint8), shape)  # runs of equal words of several values
    for array in (noise, short, long, stripes, np.zeros(shape, np.uint8), np.asfortranarray(long)):
        counts = byte_histogram(array)
        assert counts.dtype == np.int64
        np.testing.assert_array_equal(counts, np.bincount(array.ravel(), minlength=256))


def test_byte_histogram_is_exact_beyond_float32():
    counts = byte_histogram(np.full(2**24 + 3, 7, np.uint8))
    assert counts[7] == counts.sum() == 2**24 + 3


@pytest.mark.parametrize("workers", [0, 2])
def test_unknown_value_names_file_value_and_count(tmp_path, workers):
    data = written(tmp_path / "data")
    path = data.samples[4].labels[0]
    label = np.full((11, 17), 5, np.uint8)
    label[3, 4:6] = 99
    Image.fromarray(label).save(path)
    with pytest.raises(
        InputError, match=r"^label .*/4\.png has values .*: 99 \(2 pixels\); allowed are 0, 5\.\.8, 300"
    ):
        count_labels(data, workers=workers)
    Image.fromarray(label.T).save(path)
    with pytest.raises(InputError, match=r"^image .*/4\.jpg is 17x11 but its label .*/4\.png is 11x17; both must have"):
        count_labels(data, workers=workers)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"^label .*/4\.png is empty \(0 bytes\)"):
        count_labels(data, workers=workers)


def test_unlabelled_split():
    data = SampleSet([Sample(name="x", image=Path(__file__))], table=TABLE, name="toy", split="test")
    with pytest.raises(InputError, match="split 'test' of toy has no labels"):
        count_labels(data, workers=0)


def test_dictionary_round_trip(tmp_path):
    counts = count_labels(written(tmp_path / "data"), workers=0)
    again = LabelCounts.from_dict(counts.as_dict())
    np.testing.assert_array_equal(again.class_pixels, counts.class_pixels)
    np.testing.assert_array_equal(again.class_images, counts.class_images)
    assert again.class_pixels.dtype == np.int64
    assert again.as_dict() == counts.as_dict()
    assert counts.as_dict()["classes"]["c"] == {"pixels": 0, "images": 0}


def forbid_counting(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("counted again")

    monkeypatch.setattr(statistics, "label_histogram", refuse)


def test_the_second_call_answers_from_the_cache(tmp_path, monkeypatch):
    data = written(tmp_path / "data")
    first = count_labels(data, workers=0, cache_dir=tmp_path / "cache")
    forbid_counting(monkeypatch)
    again = count_labels(written(tmp_path / "data"), workers=0, cache_dir=tmp_path / "cache")
    assert again.as_dict() == first.as_dict()


def test_a_changed_file_is_counted_again(tmp_path):
    data = written(tmp_path / "data")
    first = count_labels(data, workers=0, cache_dir=tmp_path / "cache")
    path = data.samples[2].labels[0]
    state = path.stat()
    Image.fromarray(np.full((11, 17), 8, np.uint8)).save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # one nanosecond is enough
    second = count_labels(data, workers=0, cache_dir=tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert second.class_pixels.tolist() == loop(data)[0]
    assert second.class_pixels[2] == 11 * 17


def test_a_torn_cache_file_is_replaced(tmp_path):
    data = written(tmp_path / "data")
    first = count_labels(data, workers=0, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "label_counts").glob("*.npz")
    whole = path.read_bytes()
    with np.load(path) as content:
        text, has_class = str(content["counts"]), content["has_class"]

    def archive(text: str, has_class: np.ndarray = has_class) -> bytes:
        file = io.BytesIO()
        np.savez(file, counts=text, has_class=has_class)
        return file.getvalue()

    count = f'"pixels": {first.class_pixels[0]}'
    assert count in text
    numbers = (f'"pixels": {number}' for number in ("1.5", "true", '"7"', "-1", 10**30))
    flipped = (whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :] for at in range(5, len(whole), 97))
    for damaged in (
        *(archive(text.replace(count, number, 1)) for number in numbers),
        *map(archive, ("", "[]", "{}", "[" * 10**5, text.replace(first.fingerprint, "0" * 32))),
        *(archive(text, array) for array in (has_class[1:], has_class.astype(int))),
        *(whole[:-9], b"", *flipped),
    ):
        path.write_bytes(damaged)
        again = count_labels(data, workers=0, cache_dir=tmp_path / "cache")
        assert again.as_dict() == first.as_dict()
    path.unlink()
    os.mkfifo(path)  # to open it would wait
    assert count_labels(data, workers=0, cache_dir=tmp_path / "cache").as_dict() == first.as_dict()


def test_a_cache_that_cannot_be_written_is_refused_before_counting(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(statistics, "_count", None)
    with pytest.raises(InputError, match=r"cache_dir is .*file, where nothing can be written .*set cache_dir=DIR"):
        count_labels(written(tmp_path / "data"), workers=0, cache_dir=tmp_path / "file")


def test_fingerprint_follows_everything_that_matters(tmp_path):
    data = written(tmp_path / "data")
    marks = [fingerprint(data)]
    assert fingerprint(written(tmp_path / "data")) == marks[0]
    marks.append(fingerprint(data[:5]))
    marks.append(fingerprint(data.subset([1, 0, 2, 3, 4, 5])))
    marks.append(fingerprint(written(tmp_path / "data", split="val")))
    other = table_from_dict({**CONTENT, "raw_to_train": {**CONTENT["raw_to_train"], "7": 2}})
    marks.append(fingerprint(written(tmp_path / "data", table=other)))
    for add in (0, 1):
        reader = partial(wide_label, add=add)
        marks.append(fingerprint(SampleSet(data.samples, table=TABLE, name="toy", split="train", load_label=reader)))
    data.samples[0].image.write_bytes(data.samples[1].image.read_bytes() + b"\0")
    marks.append(fingerprint(data))
    assert len(set(marks)) == len(marks)


def test_fingerprint_does_not_depend_on_the_place(tmp_path):
    data = written(tmp_path / "data")
    mark = fingerprint(data)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "data")  # keeps the times
    assert fingerprint(written(tmp_path / "elsewhere" / "data")) == mark


def test_fingerprint_of_drawn_data_follows_its_options():
    marks = {
        fingerprint(open_dataset("synthetic", split="train", num_images=num, seed=seed, size=size))
        for num in (3, 4)
        for seed in (0, 1)
        for size in ([64, 64], [64, 80])
    }
    assert len(marks) == 8


def test_missing_file(tmp_path):
    data = written(tmp_path / "data")
    data.samples[3].image.unlink()
    with pytest.raises(InputError, match=r"3\.jpg does not exist"):
        fingerprint(data)


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_camvid_equals_the_published_counts(shared_data, split, tmp_path, monkeypatch):
    data = open_dataset("camvid", root=shared_data / "CamVid", split=split)
    counts = count_labels(data, workers=2, cache_dir=tmp_path)
    published = json.loads((shared_data / "labels" / "camvid.json").read_text())["pixel_counts"][split]
    assert counts.class_pixels.tolist() == published[:11]
    assert counts.ignored_pixels == published[11]
    forbid_counting(monkeypatch)
    assert count_labels(data, workers=2, cache_dir=tmp_path).as_dict() == counts.as_dict()


def dying_label(sample):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_process_is_told_in_a_sentence():
    samples = [Sample(name=str(i), image=Path("x"), labels=()) for i in range(4)]
    data = SampleSet(samples, table=TABLE, name="toy", split="train", load_label=dying_label, labelled=True)
    with pytest.raises(InputError, match=r"a process that reads the data died.*set workers=0 or fewer"):
        count_labels(data, workers=2)
