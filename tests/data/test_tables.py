"""The shipped label tables against the collected facts, and tables that do not fit together."""

import json

import pytest

from segkit.data.labels import TABLES, load_table, table_file, table_from_dict
from segkit.errors import InputError

FACTS = {
    "ade20k": "ade20k_sceneparse150",
    "bdd100k": "bdd100k_semseg",
    "camvid": "camvid",
    "cityscapes": "cityscapes",
    "cocostuff10k": "cocostuff10k",
    "mapillary": "mapillary_vistas_v1.2",
    "robotic_instrument_parts": "endovis2017_parts",
    "voc": "voc2012",
}
NUM_CLASSES = {
    "ade20k": 150,
    "bdd100k": 19,
    "cocostuff10k": 171,
    "mapillary": 65,
    "robotic_instrument_binary": 2,
    "robotic_instrument_parts": 5,
    "robotic_instrument_type": 8,
    "voc": 21,
}


@pytest.mark.data
@pytest.mark.parametrize("name", FACTS)
def test_table_equals_the_facts_entry_by_entry(name, shared_data):
    facts = json.loads((shared_data / "labels" / f"{FACTS[name]}.json").read_text())
    table = load_table(name)
    assert list(table.classes) == facts["classes"]
    assert table.palette.tolist() == facts["palette"]
    assert table.num_classes == facts["num_classes"]
    assert table.ignore_index == facts["ignore_index"]
    assert table.raw_to_train == {int(raw): train for raw, train in facts["raw_to_train"]["map"].items()}
    for split, num in facts["splits"].items():
        if split != "rule":
            assert table.splits[split] == num


@pytest.mark.data
def test_extras_equal_the_facts(shared_data):
    def facts(name):
        return json.loads((shared_data / "labels" / f"{FACTS[name]}.json").read_text())

    labels = [{k: v for k, v in entry.items() if k != "id"} for entry in facts("mapillary")["raw_labels"]]
    assert table_file("mapillary")["config_labels"] == labels
    portrait, mismatched = facts("bdd100k")["bad_pairs"], table_file("bdd100k")["mismatched_pairs"]
    assert mismatched["portrait"] == {split: portrait[split] for split in ("train", "val")}
    assert all(key in portrait["note"] for keys in mismatched["old"].values() for key in keys)
    assert table_file("robotic_instrument_parts")["mask_folders"] == facts("robotic_instrument_parts")["mask_folders"]
    assert table_file("robotic_instrument_type")["type_mapping"] == facts("robotic_instrument_parts")["type_mapping"]
    coco = table_file("cocostuff10k")
    assert coco["raw_names"] == facts("cocostuff10k")["raw_labels"]
    assert coco["unused_raw_ids"] == facts("cocostuff10k")["unused_raw_ids"]


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_table_maps_there_and_back(name):
    table = load_table(name)
    assert table.num_classes == NUM_CLASSES[name]
    assert table.source
    assert sorted(table.train_to_raw) == list(range(table.num_classes))
    for train, raw in table.train_to_raw.items():
        assert table.raw_to_train[raw] == train
    kept = [train for train in table.raw_to_train.values() if train != 255]
    assert sorted(kept) == list(range(table.num_classes)), "one raw value a class"


def test_every_shipped_table_loads():
    paths = sorted(TABLES.glob("*.json"))
    assert len(paths) >= len(NUM_CLASSES)
    for path in paths:
        assert load_table(path.stem).num_classes > 1


def test_type_codes_are_the_classes_of_the_type_table():
    table = load_table("robotic_instrument_type")
    for name, code in table_file("robotic_instrument_type")["type_mapping"].items():
        assert table.classes[table.raw_to_train[code]] == name.lower().replace("_", " ")


def test_mapillary_ignores_only_the_label_that_is_not_evaluated():
    table = load_table("mapillary")
    for index, entry in enumerate(table_file("mapillary")["config_labels"]):
        expected = index if entry["evaluate"] else 255
        assert table.raw_to_train[index] == expected
        if entry["evaluate"]:
            assert table.classes[index] == entry["readable"]
            assert table.palette[index].tolist() == entry["color"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"palette": [[0, 0, 0]]}, r"has 2 classes but a palette of shape \(1, 3\)"),
        ({"palette": [[0, 0, 0], [1, 1]]}, r"x has colours of unequal lengths; give one \[red, green, blue\] of"),
        ({"palette": [[0, 0], [0, 0], [0, 0]]}, r"has 2 classes but a palette of shape \(3, 2\)"),
        ({"raw_to_train": {"0": 0}}, r"has no raw value for class 1 \(b\)"),
        ({"raw_to_train": {"0": 0, "1": 1, "2": 7}}, r"maps raw value 2 to 7; allowed are 0\.\.1 and 255"),
        ({"classes": ["a", "a"]}, r"names a class twice: a"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(change, message):
    content = {"name": "x", "classes": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]]}
    content["raw_to_train"] = {"0": 0, "1": 1, "255": 255}
    table_from_dict(content)
    with pytest.raises(InputError, match=message):
        table_from_dict({**content, **change})
