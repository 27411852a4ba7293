"""Robotic Instrument: merging, overlap rules, tasks, splits, folder discovery, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.data.decode import read_index_png
from segkit.data.readers.robotic_instrument import FOLDS, PAPER_FRAMES, instrument_folders
from segkit.errors import InputError
from segkit.synthetic.sample_maker import make_sample

NAME = "robotic_instrument"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A sample that no test may change."""
    return make_sample(NAME, tmp_path_factory.mktemp("endovis") / "data", num_images=8, scale=0.1)


@pytest.fixture
def tiny(tmp_path):
    """Two sequences of 2x3 pixels with frames 0, 150 and 175, whose masks the test sets."""
    folders = {
        1: ("Left_Prograsp_Forceps_labels", "Other_labels"),
        6: ("Monopolar_Curved_Scissors_labels", "Prograsp_Forceps"),
    }
    for number, names in folders.items():
        for frame in (0, 150, 175):
            sequence = tmp_path / f"instrument_dataset_{number}"
            write(sequence / "left_frames" / f"frame{frame:03d}.png", np.zeros((2, 3, 3)))
            for name in names:
                write(sequence / "ground_truth" / name / f"frame{frame:03d}.png", np.zeros((2, 3)))
    return tmp_path


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def mask(root, number, folder, frame=0):
    return root / f"instrument_dataset_{number}" / "ground_truth" / folder / f"frame{frame:03d}.png"


def pixels_of(path):
    stored = np.array(Image.open(path))
    return stored if stored.ndim == 2 else stored[..., 0]


def slow_label(paths, *, task, overlap, types):
    """One pixel after the other, by the rules as they are written down."""
    masks = [pixels_of(path) for path in paths]
    label = np.zeros(masks[0].shape, int)
    for i, j in np.ndindex(label.shape):
        values = [int(m[i, j]) for m in masks]
        num = sum(value > 0 for value in values)
        if overlap == "ignore" and num > 1 and task != "binary":
            label[i, j] = 255
        elif task == "parts":
            label[i, j] = sum(values) // 10 if sum(values) <= 40 else 0
        elif task == "binary":
            label[i, j] = num > 0
        else:
            for path, value in zip(paths, values, strict=True):
                if value:
                    label[i, j] = next(code for name, code in types.items() if name in path.parent.name)
    return label


TYPES = {
    "Bipolar_Forceps": 1,
    "Prograsp_Forceps": 2,
    "Large_Needle_Driver": 3,
    "Vessel_Sealer": 4,
    "Grasping_Retractor": 5,
    "Monopolar_Curved_Scissors": 6,
    "Other": 7,
}


@pytest.mark.parametrize("task", ["parts", "binary", "type"])
@pytest.mark.parametrize("overlap", ["paper", "ignore"])
def test_merged_labels_equal_a_slow_reference(sample, task, overlap):
    data = open_dataset(NAME, root=sample, split="train", task=task, overlap=overlap)
    assert len(data) == 8
    for index, entry in enumerate(data.samples):
        expected = slow_label(entry.labels, task=task, overlap=overlap, types=TYPES)
        np.testing.assert_array_equal(data.label(index), expected)


def test_the_overlap_rules_of_the_paper(tiny):
    """10+10 is wrist, 10+20 claspers, 10+30 and 20+20 probe, and all above is background."""
    write(mask(tiny, 1, "Left_Prograsp_Forceps_labels"), [[10, 10, 10], [20, 30, 40]])
    write(mask(tiny, 1, "Other_labels"), [[10, 20, 30], [20, 30, 0]])
    data = open_dataset(NAME, root=tiny, split="train")
    np.testing.assert_array_equal(data.label(0), [[2, 3, 4], [4, 0, 4]])
    data = open_dataset(NAME, root=tiny, split="train", overlap="ignore")
    np.testing.assert_array_equal(data.label(0), [[255, 255, 255], [255, 255, 4]])


def test_the_last_folder_wins_for_types(tiny):
    write(mask(tiny, 6, "Monopolar_Curved_Scissors_labels"), [[10, 10, 0], [0, 0, 0]])
    write(mask(tiny, 6, "Prograsp_Forceps"), [[20, 0, 20], [0, 0, 0]])
    data = open_dataset(NAME, root=tiny, split="train", task="type")
    np.testing.assert_array_equal(data.label(1), [[2, 6, 2], [0, 0, 0]])


def test_classes_of_the_tasks(sample):
    def classes(task):
        return open_dataset(NAME, root=sample, split="val", task=task).classes

    assert classes("parts") == ("background", "shaft", "wrist", "claspers", "probe")
    assert classes("binary") == ("background", "instrument")
    assert len(classes("type")) == 8


def test_colour_masks_count_by_their_first_channel(sample, tmp_path):
    path = next((sample / "instrument_dataset_7" / "ground_truth").glob("*/frame000.png"))
    with Image.open(path) as stored:
        assert stored.mode == "RGB"
    assert set(np.unique(read_index_png(path, first_channel=True))) <= {0, 10, 20, 30}
    unequal = np.zeros((2, 2, 3))
    unequal[..., 0], unequal[..., 1] = 10, 77
    np.testing.assert_array_equal(
        read_index_png(write(tmp_path / "frame000.png", unequal), first_channel=True), np.full((2, 2), 10)
    )


def test_values_that_are_no_code(tiny):
    path = write(mask(tiny, 1, "Left_Prograsp_Forceps_labels"), [[31, 31, 9], [50, 0, 10]])
    data = open_dataset(NAME, root=tiny, split="train")
    with pytest.raises(InputError, match=rf"mask {path} has .*9 \(1 pixels\), 31 \(2 pixels\), 50 .*odd_values=floor"):
        data.label(0)
    data = open_dataset(NAME, root=tiny, split="train", odd_values="floor")
    np.testing.assert_array_equal(data.label(0), [[3, 3, 0], [0, 0, 1]])


def test_nothing_is_written_into_the_data(sample):
    def state():
        return {path: path.stat().st_mtime_ns for path in sorted(sample.rglob("*"))}

    before = state()
    for task in ("parts", "binary", "type"):
        for split in ("train", "val", "test"):
            list(open_dataset(NAME, root=sample, split=split, task=task))
    assert state() == before


def test_instrument_folders_are_found_by_their_frames(sample, tiny):
    assert [f.name for f in instrument_folders(sample / "instrument_dataset_6")] == [
        "Left_Large_Needle_Driver_labels",
        "Monopolar_Curved_Scissors_labels",
        "Prograsp_Forceps",
        "Right_Large_Needle_Driver_labels",
    ]
    truth = tiny / "instrument_dataset_1" / "ground_truth"
    for name in ("parts_labels", "type_labels", "binary_labels"):
        write(truth / name / "frame000.png", np.full((2, 3), 30))
    (truth / "notes").mkdir()
    write(truth / "preview" / "picture.png", np.zeros((2, 3)))
    names = [folder.name for folder in instrument_folders(tiny / "instrument_dataset_1")]
    assert names == ["Left_Prograsp_Forceps_labels", "Other_labels"]
    assert (open_dataset(NAME, root=tiny, split="train").label(0) == 0).all()


def test_the_paper_splits_by_frame(tiny):
    assert [len(frames) * 8 for frames in PAPER_FRAMES.values()] == [1200, 200, 400]
    for split, frame in (("train", 0), ("val", 150), ("test", 175)):
        data = open_dataset(NAME, root=tiny, split=split)
        names = [sample.name for sample in data.samples]
        assert names == [f"instrument_dataset_{number}_frame{frame:03d}" for number in (1, 6)]


@pytest.mark.parametrize("fold", range(4))
def test_folds_hold_out_whole_sequences(sample, fold):
    def sequences(split):
        data = open_dataset(NAME, root=sample, split=split, splits="sequence", fold=fold)
        assert len(data) == 3 * len({s.name[:20] for s in data.samples}), "every frame of a sequence"
        return {int(s.name.split("_")[2]) for s in data.samples}

    assert sequences("val") == set(FOLDS[fold])
    assert sequences("train") == set(range(1, 9)) - set(FOLDS[fold])
    with pytest.raises(InputError, match=r"\(splits=sequence\) has no split 'test'; allowed are train, val"):
        sequences("test")


def test_missing_sequences_are_said(tiny):
    data = open_dataset(NAME, root=tiny, split="train")
    assert len(data.notes) == 1
    assert data.notes[0].startswith("sequences 2, 3, 4, 5, 7, 8 of 1..8 are not under")
    with pytest.raises(
        InputError, match=r"^sequences 2, 5 of split val are not under .*: unpack instrument_1_4_training"
    ):
        open_dataset(NAME, root=tiny, split="val", splits="sequence", fold=1)


@pytest.mark.parametrize("inner", ["training", "instrument_1_4_training"])
def test_folders_that_may_lie_between(tiny, inner):
    (tiny / inner).mkdir()
    shutil.move(tiny / "instrument_dataset_1", tiny / inner)
    shutil.copytree(tiny / "instrument_dataset_6", tiny / "instrument_1_4_testing" / "instrument_dataset_6")
    data = open_dataset(NAME, root=tiny, split="train")
    assert [sample.name for sample in data.samples] == [
        "instrument_dataset_1_frame000",
        "instrument_dataset_6_frame000",
    ]
    shutil.copytree(tiny / "instrument_dataset_6", tiny / inner / "instrument_dataset_6")
    with pytest.raises(InputError, match=r"instrument_dataset_6 lies in .* and in .*; keep one of the two"):
        open_dataset(NAME, root=tiny, split="train")


def test_missing_masks_images_and_folders_are_named(tiny):
    path = mask(tiny, 1, "Other_labels")
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=rf"frame000.png of {NAME} has no label \({path} is missing\)"):
        open_dataset(NAME, root=tiny, split="train")
    path.write_bytes(content)
    (tiny / "instrument_dataset_1" / "left_frames" / "frame000.png").unlink()
    with pytest.raises(
        InputError, match=r"label .*frame000.png of .* has no image \(.*left_frames/frame000.png is missing\)"
    ):
        open_dataset(NAME, root=tiny, split="train")
    for folder in ("Left_Prograsp_Forceps_labels", "Other_labels"):
        shutil.rmtree(tiny / "instrument_dataset_1" / "ground_truth" / folder)
    with pytest.raises(InputError, match=r"no folder of .*ground_truth holds masks named frame000.png"):
        open_dataset(NAME, root=tiny, split="train")
    (tiny / "instrument_dataset_1" / "ground_truth").rmdir()
    with pytest.raises(InputError, match=r"ground_truth does not exist; unpack instrument_1_4_training.zip"):
        open_dataset(NAME, root=tiny, split="train")


def test_masks_of_different_sizes_and_unknown_instruments(tiny):
    write(mask(tiny, 1, "Other_labels"), np.zeros((2, 4)))
    with pytest.raises(InputError, match=r"of one frame have sizes \(3, 2\) and \(4, 2\)"):
        open_dataset(NAME, root=tiny, split="train").label(0)
    truth = tiny / "instrument_dataset_6" / "ground_truth"
    (truth / "Prograsp_Forceps").rename(truth / "Suction_labels")
    write(truth / "Suction_labels" / "frame000.png", np.full((2, 3), 10))
    assert open_dataset(NAME, root=tiny, split="train").label(1).max() == 1
    with pytest.raises(InputError, match=r"Suction_labels names no known instrument; its name must contain"):
        open_dataset(NAME, root=tiny, split="train", task="type").label(1)


def test_a_damaged_mask_is_named(tiny):
    path = mask(tiny, 1, "Other_labels")
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(InputError, match=rf"{path} is damaged"):
        open_dataset(NAME, root=tiny, split="train").label(0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"task": "x"}, "has no task 'x'; allowed are parts, binary, type: set dataset.reader.task=parts"),
        ({"splits": "video"}, "has no splits 'video'; allowed are paper, sequence"),
        ({"fold": 4}, "has no fold 4; allowed are 0, 1, 2, 3"),
        ({"fold": 1}, "fold is 1, but splits=paper has no folds: set dataset.reader.splits=sequence"),
        ({"overlap": "sum"}, "has no overlap 'sum'; allowed are paper, ignore"),
        ({"odd_values": "keep"}, "has no odd_values 'keep'; allowed are error, floor"),
    ],
)
def test_unknown_options_are_refused(tiny, option, message):
    with pytest.raises(InputError, match=message):
        open_dataset(NAME, root=tiny, split="train", **option)


def test_folder_levels(sample):
    with pytest.raises(InputError, match=rf"is too deep for {NAME}.*set dataset.root={sample}$"):
        open_dataset(NAME, root=sample / "instrument_dataset_1", split="train")
    with pytest.raises(InputError, match=rf"is one level too shallow for {NAME}.*set dataset.root={sample}$"):
        open_dataset(NAME, root=sample.parent, split="train")
    with pytest.raises(InputError, match=r"does not exist; unpack instrument_1_4_training.zip and instrument_5_8"):
        open_dataset(NAME, root=sample / "a" / "b" / "c", split="train")


@pytest.mark.data
def test_real_frames(shared_data):
    root = shared_data / "samples" / "endovis2017"
    for task in ("parts", "binary", "type"):
        data = open_dataset(NAME, root=root, split="train", task=task)
        assert [s.name for s in data.samples] == [f"instrument_dataset_4_frame{i:03d}" for i in (0, 1)]
        assert [path.parent.name for path in data.samples[0].labels] == [
            "Large_Needle_Driver_Left_labels",
            "Large_Needle_Driver_Right_labels",
            "Prograsp_Forceps_labels",
        ]
        for index, item in enumerate(data):
            assert item.image.shape == (1080, 1920, 3)
            masks = [pixels_of(path).astype(int) for path in data.samples[index].labels]
            total, covered = sum(masks), sum(m > 0 for m in masks)
            if task == "parts":
                np.testing.assert_array_equal(item.label, np.where(total > 40, 0, total) // 10)
            elif task == "binary":
                np.testing.assert_array_equal(item.label, covered > 0)
            else:
                alone = covered == 1
                drivers = (masks[0] > 0) | (masks[1] > 0)
                np.testing.assert_array_equal(item.label[alone], np.where(drivers, 3, 2)[alone])
                assert set(np.unique(item.label)) <= {0, 2, 3}
    with pytest.raises(InputError, match="split 'val' of robotic_instrument has no samples"):
        open_dataset(NAME, root=root, split="val")
