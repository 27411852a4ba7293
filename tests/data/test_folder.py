"""A folder of one's own: classes.yaml, splits by sub-folders and by lists, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.data.formats.classes import default_palette, read_classes
from segkit.data.statistics import count_labels
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample


@pytest.fixture
def root(tmp_path):
    return make_sample("folder", tmp_path / "own", num_images=3)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


@pytest.fixture
def listed(tmp_path):
    """Images in nested folders, with list files in place of sub-folders for the splits."""
    root = tmp_path / "listed"
    for name in ("day/a.jpg", "day/b.PNG", "night/a.tif", "c.jpeg"):
        write(root / "images" / name, np.zeros((4, 5, 3)))
        write((root / "labels" / name).with_suffix(".png"), np.full((4, 5), 1))
    (root / "classes.yaml").write_text("names: [background, tool]\n")
    (root / "train.txt").write_text("day/a.jpg\nnight/a\n\n")
    (root / "val.txt").write_text("c.jpeg\n")
    return root


def test_sub_folders_are_splits_and_ids_map_to_classes(root):
    data = open_dataset("folder", root=root, split="train")
    assert data.classes == ("ground", "plant", "stone", "tool")
    assert data.palette[3].tolist() == [220, 60, 40]
    to_train = {0: 255, 1: 0, 2: 1, 5: 2, 9: 3}
    assert len(data) == 3
    for item in data:
        raw = np.array(Image.open(root / "labels" / "train" / f"{item.name}.png"))
        np.testing.assert_array_equal(item.label, np.vectorize(to_train.get)(raw))
    assert len(open_dataset("folder", root=root, split="val")) == 2


def test_list_files_are_splits(listed):
    data = open_dataset("folder", root=listed, split="train")
    assert [sample.name for sample in data.samples] == ["day/a", "night/a"]
    assert (data[1].label == 1).all()
    assert len(open_dataset("folder", root=listed, split="val")) == 1


def test_a_test_split_may_have_no_labels(root):
    write(root / "images" / "test" / "x.png", np.zeros((4, 4, 3)))
    assert not open_dataset("folder", root=root, split="test").labelled
    write(root / "images" / "train2" / "x.png", np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match=r"images/train2 has images but no labels: .*train2 does not .*labels=masks"):
        open_dataset("folder", root=root, split="train2")
    (root / "images").rename(root / "Images")
    with pytest.raises(InputError, match=r"images does not exist, but .*Images is there, .* dataset.reader.images\)"):
        open_dataset("folder", root=root, split="train")


def test_pairs_must_be_complete(root):
    (root / "labels" / "train" / "0001.png").rename(root / "labels" / "train" / "0009.png")
    with pytest.raises(InputError, match=r"0001.jpg of folder has no label"):
        open_dataset("folder", root=root, split="train")
    (root / "images" / "train" / "0001.jpg").unlink()
    with pytest.raises(InputError, match=r"label .*0009.png of folder has no image"):
        open_dataset("folder", root=root, split="train")


def test_an_unknown_split_names_those_that_are_there(root, listed):
    for place in (root, listed):
        (place / "classes.txt").write_text("names of classes, of YOLO's tools")
    with pytest.raises(
        InputError,
        match=r"'valid' of .* does not exist: .*; add one of the two, or set dataset.train_split .*to train, val$",
    ):
        open_dataset("folder", root=root, split="valid")
    with pytest.raises(InputError, match=r"to day, night, train, val$"):
        open_dataset("folder", root=listed, split="test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../secret.jpg", r"entry '../secret.jpg' of .*train.txt leaves the data set's folder"),
        ("/etc/hosts", r"leaves the data set's folder"),
        ("day/a.jpg", r"names 'day/a.jpg' twice"),
        ("day/a", r"'day/a' occurs twice in split 'train'"),
        ("day/z.jpg", r"names 'day/z.jpg', but .*day/z.jpg does not exist"),
    ],
)
def test_bad_lines_are_refused(listed, line, message):
    with (listed / "train.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root=listed, split="train")


def test_a_listed_image_without_label_is_named(listed):
    (listed / "labels" / "day" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a.jpg has no label \(.*day/a.png is missing\).*train.txt"):
        open_dataset("folder", root=listed, split="train")


def test_a_list_with_a_byte_order_mark(listed):
    (listed / "train.txt").write_text("day/a.jpg\r\nnight/a\r\n", encoding="utf-8-sig", newline="")
    data = open_dataset("folder", root=listed, split="train")
    assert [sample.name for sample in data.samples] == ["day/a", "night/a"]


def test_a_list_named_test_may_be_without_labels(listed):
    write(listed / "images" / "new.jpg", np.zeros((4, 5, 3)))
    (listed / "test.txt").write_text("new.jpg\n")
    assert not open_dataset("folder", root=listed, split="test").labelled
    (listed / "test.txt").write_text("new.jpg\nday/b.PNG\n")
    with pytest.raises(InputError, match=r"image .*new.jpg has no label \(.*labels/new.png is missing\).*test.txt"):
        open_dataset("folder", root=listed, split="test")
    (listed / "test.txt").write_text("day/b.PNG\n")
    assert open_dataset("folder", root=listed, split="test").labelled
    (listed / "other.txt").write_text("new.jpg\n")
    with pytest.raises(InputError, match=r"image .*new.jpg has no label"):
        open_dataset("folder", root=listed, split="other")


def test_an_empty_folder_of_test_labels_counts_as_none(root):
    write(root / "images" / "test" / "x.png", np.zeros((4, 4, 3)))
    (root / "labels" / "test").mkdir()
    assert not open_dataset("folder", root=root, split="test").labelled


def test_near_misses_stand_in_the_sentences(root, listed):
    folder = root / "labels" / "train"
    for path in folder.iterdir():
        path.rename(folder / f"{path.stem}_mask.png")
    expected = r"0000.png is missing, but .*0000_mask.png is there, whose name differs by '_mask'\) and 2 more like it"
    with pytest.raises(InputError, match=expected):
        open_dataset("folder", root=root, split="train")
    (listed / "train.txt").write_text("day/A.jpg\n")
    with pytest.raises(
        InputError, match=r"A.jpg does not exist, but .*a.jpg is there, whose name differs in upper and"
    ):
        open_dataset("folder", root=listed, split="train")
    (listed / "labels" / "c.png").rename(listed / "labels" / "c.jpg")
    with pytest.raises(
        InputError, match=r"c.png is missing, but .*c.jpg is there, whose name differs in its extension"
    ):
        open_dataset("folder", root=listed, split="val")
    with pytest.raises(
        InputError, match=r"nor a list file .*Val.txt, but .*val.txt is there, whose name differs in upper"
    ):
        open_dataset("folder", root=listed, split="Val")


def test_labels_in_jpeg_are_to_be_written_anew(root):
    for path in (root / "labels" / "train").iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(InputError, match=r"0000.jpg is there, .* 2 more like it; write the labels as PNG from"):
        open_dataset("folder", root=root, split="train")


def test_a_photo_in_a_form_that_is_not_read_is_a_near_miss(root):
    (root / "images" / "train" / "0000.jpg").rename(root / "images" / "train" / "0000.heic")
    with pytest.raises(
        InputError, match=r"0000.jpg is missing, but .*0000.heic is there, whose name differs in its ext"
    ):
        open_dataset("folder", root=root, split="train")


def test_an_image_beside_which_its_label_is_missing_is_no_near_miss_of_it(root):
    with pytest.raises(InputError, match=r"0000.jpg of folder has no label \(.*images/train/0000.png is missing\) and"):
        open_dataset("folder", root=root, split="train", labels="images")


def test_files_of_another_split_do_not_matter(root, listed):
    write(root / "images" / "train" / "0000.bmp", np.zeros((4, 4, 3)))
    (root / "labels" / "train" / "0001.png").unlink()
    assert len(open_dataset("folder", root=root, split="val")) == 2
    write(listed / "images" / "day" / "a.bmp", np.zeros((4, 5, 3)))
    assert len(open_dataset("folder", root=listed, split="val")) == 1
    assert open_dataset("folder", root=listed, split="train")[0].image.shape == (4, 5, 3), "the extension says which"
    (listed / "train.txt").write_text("day/a\n")
    with pytest.raises(InputError, match=r"a.bmp and .*a.jpg differ in their extension only"):
        open_dataset("folder", root=listed, split="train")


def test_two_images_of_one_name_are_refused(root):
    write(root / "images" / "train" / "0000.png", np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match=r"0000.jpg and .*0000.png differ in their extension only"):
        open_dataset("folder", root=root, split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ids: [0]", r"has no list of names"),
        ("names: []", r"has no list of names"),
        ("[a, b]", r"holds no mapping"),
        (
            "names:\n\t- a",
            r"is no valid YAML \(found character '\\t' that cannot start any token in line 2\)",
        ),
        ("names: [a, b", r"is no valid YAML"),
        ("names: [a, b]\nids: [0]", r"has 2 names but 1 ids"),
        ("names: [a, b]\ncolours: [[0, 0, 0]]", r"has 2 names but 1 colours"),
        ("names: [a, b]\ncolours: red", r"has 2 names but no list of colours"),
        ("names: [a, b]\ncolours: [[0, 0, 0], [0, 0, 300]]", r"has the colour \[0, 0, 300\]"),
        ("names: [a, b]\nids: [0, 65536]", r"has ids: \[0, 65536\], but a list of whole numbers from 0 to 65535"),
        ("names: [a, b]\nids: [0, true]", r"has ids: \[0, True\]"),
        ("names: [a, b]\nids: [1, 1]", r"uses value 1 twice"),
        ("names: [a, b]\nignore: [1]", r"uses value 1 twice among ids and ignore"),
        ("names: [a, a]", r"names a class twice: a"),
        (
            "names: [a, no]",
            r"has the class name no, which YAML reads as bool and not as text; put it in quotes: \"no\"",
        ),
        ("names: [a, 010]", r"has the class name 010, which YAML reads as int .* put it in quotes: \"010\""),
        ("names: [a, 1.0]", r"has the class name 1\.0, which YAML reads as float .* in quotes: \"1\.0\""),
        ("names: [a, 2026-01-01]", r"has the class name 2026-01-01, which YAML reads as timestamp .* in quotes"),
        ("names: [a, null]", r"has an empty name \('null'\); give each class a name, in quotes"),
        ("names: [a, ]\nids: [0]\nnames: [a, b]", r"has the key 'names' twice, of which YAML drops one; remove one"),
        ("names: ['e\u0301', '\u00e9']", r"uses name \u00e9 twice among names"),
        ("names: [a, ' a']", r"uses name a twice among names"),
        ("names: [a, '']", r"has the name '', which is no text; give each class a name, in quotes"),
        ('names: [a, "\\ud800"]', r"has the name '\\ud800', which is no text"),
        ("names: [a, [b]]", r"has a list or mapping among its names; write one text for each class"),
        (
            "names: [a, b]\nids: [0, 255]",
            r"gives class 'b' the id 255, .*: where 255 is a class, as in masks of 0 and 255",
        ),
        ("names: [a, b]\nids: [0, 255]", r"write these two lines: `ids: \[0, 255\]` and `ignore: \[\]`$"),
        ("names: [a, b]\nids: [0, 255]\nignore: [255]", r"uses value 255 twice among ids and ignore"),
        ("names: [a, b]\ncolors: []", r"has an unknown key 'colors'; allowed are names, ids"),
    ],
)
def test_classes_that_do_not_fit_together_are_refused(tmp_path, text, message):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(path)


@pytest.mark.parametrize("name", ["no", "010", "1.0", "null", "~", "Ampel: rot", "[x]", "ä"])
def test_quoted_names_are_taken_as_they_are_spelled(tmp_path, name):
    path = tmp_path / "classes.yaml"
    path.write_text(f"names: ['{name}', other]\n", encoding="utf-8-sig")
    assert read_classes(path).classes == (name, "other")


def test_the_two_lines_for_masks_of_0_and_255_are_the_cure(root):
    (root / "classes.yaml").write_text("names: [background, tool]\nids: [0, 255]\nignore: []\n")
    path = root / "labels" / "train" / "0000.png"
    write(path, np.array([[0, 255, 255]]))
    data = open_dataset("folder", root=root, split="train")
    assert data.label(0).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ("[background, tool]", [0, 255], r"no class but \['background'\], the other 1 pixels .*`ids: \[0, 255\]` and"),
        ("[tool, background]", [255, 0], r"no class but \['tool'\], .*and `ignore: \[\]`"),
        (
            "[a, b, c]",
            [0, 128, 255],
            r"128 \(1 pixels\); allowed are 0\.\.2, 255: give .*classes.yaml the value of",
        ),
        (
            "[a, b, c]",
            [1, 2, 3],
            r"are 0\.\.2, 255: give .*`ids: .* if these are void, `ignore: \[3, 255\]`",
        ),
    ],
)
def test_masks_of_other_values_than_their_places_get_the_cure(tmp_path, names, values, message):
    write(tmp_path / "images" / "train" / "a.png", np.zeros((1, len(values), 3)))
    write(tmp_path / "labels" / "train" / "a.png", [values])
    (tmp_path / "classes.yaml").write_text(f"names: {names}\n")
    with pytest.raises(InputError, match=message):
        count_labels(open_dataset("folder", root=tmp_path, split="train"), workers=0)


def test_one_class_without_void_is_counted(tmp_path):
    write(tmp_path / "images" / "train" / "a.png", np.zeros((1, 2, 3)))
    write(tmp_path / "labels" / "train" / "a.png", [[0, 0]])
    (tmp_path / "classes.yaml").write_text("names: [background, tool]\n")
    counts = count_labels(open_dataset("folder", root=tmp_path, split="train"), workers=0)
    assert counts.class_pixels.tolist() == [2, 0]


def test_a_file_of_classes_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_bytes("names: [Gelände, b]".encode("latin-1"))
    with pytest.raises(
        InputError, match=r"file of classes .*classes\.yaml is no text in UTF-8 \(byte 0xe4 .*: save it as"
    ):
        read_classes(path)


def test_too_many_classes_are_refused(tmp_path):
    path = tmp_path / "classes.yaml"
    for num, ignore in (255, "\nignore: []"), (300, ""):
        path.write_text(f"names: [{', '.join(f'c{i}' for i in range(num))}]{ignore}")
        with pytest.raises(InputError, match=rf"has {num} classes; 1 to 254 are allowed"):
            read_classes(path)
    path.write_text(f"names: [{', '.join(f'c{i}' for i in range(254))}]")
    raw = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(
        read_classes(path).to_train(raw[:, raw[0] != 254], file=path)[0, -3:], [252, 253, 255]
    )
    with pytest.raises(InputError, match=r"values that the table .* does not know: 254 \(1 pixels\)"):
        read_classes(path).to_train(raw, file=path)


def test_missing_files_and_wrong_levels(root):
    with pytest.raises(InputError, match=rf"is too deep for folder.*set dataset.root={root}$"):
        open_dataset("folder", root=root / "images", split="train")
    with pytest.raises(InputError, match=rf"is one level too shallow for folder.*set dataset.root={root}$"):
        open_dataset("folder", root=root.parent, split="train")
    (root.parent / "train").mkdir()
    (root / "images").rename(root.parent / "train" / "images")
    with pytest.raises(
        InputError, match=r"has a folder of each split, .*: move them, or set dataset\.reader\.images=tr"
    ):
        open_dataset("folder", root=root.parent, split="train")
    (root.parent / "train" / "images").rename(root / "images")
    (root / "classes.yaml").rename(root / "other.yaml")
    with pytest.raises(InputError, match=r"classes.yaml does not exist; write one .*dataset.reader.classes"):
        open_dataset("folder", root=root, split="train")
    assert len(open_dataset("folder", root=root, split="train", classes="other.yaml")) == 3
    assert len(open_dataset("folder", root=root, split="train", classes=str(root / "other.yaml"))) == 3


def test_wrong_masks_are_named(root):
    data = open_dataset("folder", root=root, split="train")
    path = data.samples[0].labels[0]
    write(path, np.full((3, 4), 7))
    with pytest.raises(InputError, match=r"7 \(12 pixels\); allowed are 0\.\.2, 5, 9"):
        data.label(0)
    write(path, np.zeros((3, 4, 3)))
    with pytest.raises(InputError, match=r"0000.png is a colour image"):
        data.label(0)


def test_default_colours_differ():
    colours = default_palette(253)
    assert len({tuple(colour) for colour in colours.tolist()}) == 253
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[1].tolist() == [128, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\n", "uses references or tags of YAML in line 1"),
        (f"names: {'[' * 3000}{']' * 3000}\n", "is nested more than 50 deep in line 1"),
        ("names: [!!python/name:os.system a]\n", "uses references or tags of YAML in line 1"),
    ],
)
def test_a_file_of_classes_has_plain_values(tmp_path, text, message):
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(InputError, match=f"{message}, but a file of classes has plain values only; write them out"):
        read_classes(tmp_path / "classes.yaml")
