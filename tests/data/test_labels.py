"""Label tables: the total map from raw values to train ids, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from segkit.data.labels import load_table, table_from_dict
from segkit.errors import InputError

CONTENT = {
    "name": "toy",
    "classes": ["road", "car", "sky"],
    "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    "raw_to_train": {"-1": 255, "0": 255, "7": 0, "26": 1, "27": 1, "300": 2},
}


def changed(**changes):
    return table_from_dict({**CONTENT, **changes})


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_to_train_equals_a_loop_over_pixels(dtype):
    table = changed(raw_to_train={"0": 255, "7": 0, "26": 1, "27": 1, "33": 2})
    rng = np.random.default_rng(0)
    raw = rng.choice([0, 7, 26, 27, 33], size=(13, 17)).astype(dtype)
    expected = np.array([[table.raw_to_train[int(value)] for value in row] for row in raw])
    train = table.to_train(raw, file="x.png")
    assert train.dtype == np.uint8
    np.testing.assert_array_equal(train, expected)


def test_values_outside_a_byte_are_mapped():
    table = changed()
    np.testing.assert_array_equal(table.to_train(np.array([[-1, 300, 7]]), file="x"), [[255, 2, 0]])


def test_unknown_values_name_file_value_and_count():
    raw = np.array([[7, 9, 9], [26, 0, 200]], np.uint8)
    expected = r"a/b\.png .*toy.*: 9 \(2 pixels\), 200 \(1 pixels\); allowed are -1\.\.0, 7, 26\.\.27, 300"
    with pytest.raises(InputError, match=expected):
        changed().to_train(raw, file="a/b.png")
    with pytest.raises(InputError, match=r"9 \(2 pixels\)"):
        changed().to_train(raw.astype(np.int64), file="a/b.png")


def test_many_unknown_values_are_cut_short():
    raw = np.arange(100, 130, dtype=np.uint8)[None]
    with pytest.raises(InputError, match="and 25 other values"):
        changed().to_train(raw, file="x")


def test_train_to_raw_defaults_to_the_lowest_raw_value():
    assert changed().train_to_raw == {0: 7, 1: 26, 2: 300}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"palette": [[1, 2, 3]]}, "3 classes but a palette of shape"),
        ({"classes": ["a", "b", "a"]}, "names a class twice: a"),
        ({"raw_to_train": {"0": 0, "1": 1, "2": 9}}, r"maps raw value 2 to 9; allowed are 0\.\.2 and 255"),
        ({"raw_to_train": {"0": 0, "1": 1}}, r"no raw value for class 2 \(sky\)"),
        ({"ignore_index": 0}, "ignore_index 0; it must be 255"),
        ({"classes": [], "palette": []}, "has 0 classes"),
    ],
)
def test_wrong_tables_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        changed(**changes)


def test_unknown_table():
    with pytest.raises(InputError, match=r"no label table 'nowhere'; shipped are: .*camvid"):
        load_table("nowhere")


def test_palette_of_too_large_values_is_refused():
    with pytest.raises(InputError, match=r"palette value outside 0\.\.255"):
        changed(palette=[[1, 2, 3], [4, 5, 6], [7, 8, 300]])


@pytest.mark.data
@pytest.mark.parametrize("name", ["camvid", "cityscapes"])
def test_shipped_tables_equal_the_collected_facts(shared_data, name):
    facts = json.loads((shared_data / "labels" / f"{name}.json").read_text())
    table = load_table(name)
    assert list(table.classes) == facts["classes"]
    assert table.palette.tolist() == facts["palette"]
    assert table.raw_to_train == {int(raw): train for raw, train in facts["raw_to_train"]["map"].items()}
    assert table.splits == facts["splits"]
    if "train_to_raw" in facts:
        assert table.train_to_raw == {int(train): raw for train, raw in facts["train_to_raw"].items()}
