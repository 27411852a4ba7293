"""Batches: pure order and augmentation, any number of workers, sharding, errors, clean-up."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.data import Sample, SampleSet
from segkit.data.labels import load_table
from segkit.data.loader import Batch, eval_batches, steps_per_epoch, train_batches
from segkit.data.sampling import epoch_order
from segkit.data.transforms import EvalTransform, TrainTransform
from segkit.data.workers import signals_later
from segkit.errors import InputError

TABLE = load_table("synthetic")
JITTERY = TrainTransform(crop=(16, 24), scale=(0.5, 2.0), flip=0.5, color_jitter=0.5)


def size_of(index):
    return 20 + index % 3, 30


def fake_image(sample, *, broken=()):
    index = int(sample.name)
    if index in broken:
        raise InputError(f"image {index} is broken; mend it")
    return np.random.default_rng(index).integers(0, 256, (*size_of(index), 3), dtype=np.uint8)


def fake_label(sample):
    index = int(sample.name)
    return np.random.default_rng(1000 + index).integers(0, 8, size_of(index), dtype=np.uint8)


def dying_image(sample):
    os.kill(os.getpid(), signal.SIGKILL)


def recorded_image(sample, *, seen):
    seen.append(int(sample.name))
    return fake_image(sample)


def made(num, *, load_image=fake_image, load_label=fake_label, labelled=True):
    samples = [Sample(name=str(i), image=Path(str(i))) for i in range(num)]
    return SampleSet(
        samples,
        table=TABLE,
        name="fake",
        split="train",
        load_image=load_image,
        load_label=load_label,
        labelled=labelled,
    )


def load(data, *, transform=JITTERY, batch_size=4, seed=0, phase="a", start_step=0, num_steps=6, **options):
    return train_batches(
        data,
        transform=transform,
        batch_size=batch_size,
        seed=seed,
        phase=phase,
        start_step=start_step,
        num_steps=num_steps,
        **options,
    )


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert (a.names, a.indices) == (b.names, b.indices)


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 4) for n in (1, 4, 7, 8)] == [1, 1, 1, 2]


def test_epoch_order_is_pure_and_differs_between_epochs_phases_and_seeds():
    orders = [
        epoch_order(50, seed=seed, phase=phase, epoch=epoch).tolist()
        for seed in (0, 1)
        for phase in ("a", "b")
        for epoch in (0, 1, 11)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    assert epoch_order(50, seed=0, phase="a", epoch=0).tolist() == orders[0]
    # A run that is resumed with another version of this file must see the order that it began with.
    assert epoch_order(8, seed=0, phase="train", epoch=0).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [6, 4, 5, 1, 2, 3, 7, 0]


def test_batches_have_the_promised_form():
    data = made(10)
    batches = load(data)
    assert len(batches) == 6
    for step, batch in enumerate(batches):
        assert isinstance(batch, Batch)
        assert batch.images.shape == (4, 3, 16, 24)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.labels.shape == (4, 16, 24)
        assert batch.labels.dtype == torch.uint8
        order = epoch_order(10, seed=0, phase="a", epoch=step // 2)
        assert batch.indices == order[step % 2 * 4 :][:4].tolist()
        assert batch.names == [str(i) for i in batch.indices]


def test_pixels_are_those_of_the_transform():
    data = made(8)
    whole = TrainTransform(crop=(20, 30))
    for batch in load(data, transform=whole, num_steps=2):
        for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
            item = data[index]
            rows = [r for r in range(item.label.shape[0] - 19) if (item.label[r : r + 20] == label.numpy()).all()]
            assert len(rows) == 1
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), item.image[rows[0] : rows[0] + 20])


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_bits(workers):
    data = made(10)
    assert_same(load(data), load(data, workers=workers))


def test_every_start_gives_the_same_bits():
    data = made(10)
    whole = list(load(data))
    for start in (1, 2, 5, 6, 9):
        assert_same(whole[start:], load(data, start_step=start))
    batches = load(data, start_step=4)
    assert_same(batches, batches)  # iterating twice begins anew


def test_a_late_start_reads_nothing_before_it():
    seen: list[int] = []
    data = made(10, load_image=partial(recorded_image, seen=seen))
    batch = next(iter(load(data, start_step=10**7, num_steps=10**7 + 5)))
    assert sorted(seen) == sorted(batch.indices)


def test_augmentation_depends_on_the_sample_not_on_its_batch():
    data = made(8)

    def crops(batch_size):
        batches = load(data, batch_size=batch_size, num_steps=8 // batch_size)
        return {i: image for b in batches for i, image in zip(b.indices, b.images, strict=True)}

    small, large = crops(2), crops(8)
    assert sorted(small) == sorted(large) == list(range(8))
    assert all(torch.equal(small[i], large[i]) for i in small)


def test_augmentation_changes_with_epoch_phase_and_seed():
    data = made(1)
    batches = [*load(data, batch_size=1, num_steps=3), *load(data, batch_size=1, num_steps=1, phase="b")]
    batches += load(data, batch_size=1, num_steps=1, seed=1)
    assert len({batch.images.numpy().tobytes() for batch in batches}) == 5


def test_a_set_smaller_than_a_batch():
    assert [len(batch.indices) for batch in load(made(3), num_steps=2)] == [3, 3]


def test_ranks_share_the_global_batch():
    data = made(10)
    whole = list(load(data))
    parts = [list(load(data, rank=rank, world_size=2, workers=rank)) for rank in (0, 1)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert share.indices == batch.indices[rank::2]
            assert torch.equal(share.images, batch.images[rank::2])
            assert torch.equal(share.labels, batch.labels[rank::2])


def test_unequal_shares_are_refused():
    with pytest.raises(InputError, match=r"a batch of 4 images cannot be shared out equally to 3 processes; set batch"):
        load(made(10), world_size=3)
    with pytest.raises(InputError, match=r"3 images, all that there are, .* to 2 processes; set batch_size to 2"):
        load(made(3), world_size=2)
    with pytest.raises(InputError, match=r"a batch of 1 images, .* to 2 processes; start at most 1"):
        load(made(1), world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_neither_read_nor_moved(workers):
    data = made(10)
    first = list(load(data, workers=workers))
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global generator is the subject of the test
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert_same(first, load(data, workers=workers))
    list(eval_batches(data, transform=EvalTransform(), workers=workers))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    np.testing.assert_array_equal(state[2], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
def test_an_input_error_arrives_as_it_is(workers):
    data = made(10, load_image=partial(fake_image, broken=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)))
    index = load(data).__iter__
    first = epoch_order(10, seed=0, phase="a", epoch=0)[0]
    with pytest.raises(InputError, match=rf"^image {first} is broken; mend it$"):
        next(index())
    with pytest.raises(InputError, match=rf"^image {first} is broken; mend it$"):
        list(load(data, workers=workers))
    with pytest.raises(InputError, match=r"^image 0 is broken; mend it$"):
        list(eval_batches(data, transform=EvalTransform(), workers=workers))
    with pytest.raises(InputError, match=r"^image 0 of 20x30 is resized to 99999x99999, [^\n]*$"):
        list(eval_batches(made(1), transform=EvalTransform(resize={"size": [99999] * 2}), workers=workers))
    with pytest.raises(InputError, match=rf"^image {first} of \d\dx30 is resized to 99999x99999, [^\n]*$"):
        list(load(data, transform=TrainTransform(crop=(8, 8), resize={"size": [99999] * 2}), workers=workers))
    assert multiprocessing.active_children() == []


def test_batches_before_the_error_arrive():
    order = epoch_order(10, seed=0, phase="a", epoch=0)
    data = made(10, load_image=partial(fake_image, broken=(int(order[5]),)))
    iterator = iter(load(data, workers=2))
    assert next(iterator).indices == order[:4].tolist()
    with pytest.raises(InputError, match="is broken"):
        next(iterator)


def test_a_dead_worker_is_told_in_a_sentence():
    with pytest.raises(InputError, match=r"a loading process died .*set workers=0 or fewer, or give the container"):
        list(load(made(10, load_image=dying_image), workers=1))


def test_a_batch_that_does_not_fit_into_shared_memory_is_told_in_a_sentence(monkeypatch):
    """The thread that sends a worker's batches loses it, and the main process would wait for ever."""

    def is_full(storage):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", is_full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", is_full)
    with pytest.raises(InputError, match=r"a loading process died .* too little in /dev/shm: set workers=0 or fewer"):
        list(load(made(10), workers=1))


def test_ctrl_c_while_workers_are_forked_is_not_lost():
    done, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background

    def fork():
        with signals_later():
            signal.raise_signal(signal.SIGINT)
            done.append("forked")

    try:
        with pytest.raises(KeyboardInterrupt):
            fork()
        assert done == ["forked"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def shared_memory():
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("torch_*")} if folder.is_dir() else set()


def test_workers_and_shared_memory_end_with_the_iterator():
    before = shared_memory()
    iterator = iter(load(made(10), workers=3, num_steps=100_000))
    batch = next(iterator)
    kept = batch.images.clone()
    assert len(multiprocessing.active_children()) == 3
    del iterator
    assert multiprocessing.active_children() == []
    assert torch.equal(batch.images, kept)  # a batch outlives its worker
    del batch
    gc.collect()
    assert shared_memory() <= before


def test_no_workers_are_started_for_nothing():
    assert list(load(made(10), start_step=6, workers=4)) == []
    assert len(load(made(10), start_step=9)) == 0


def test_unlabelled_split_cannot_be_trained_on():
    with pytest.raises(InputError, match=r"split 'train' of fake has no labels, so it cannot be trained on"):
        load(made(4, labelled=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_group_equal_neighbours(workers):
    samples = made(9).samples
    order = [0, 3, 6, 1, 4, 2, 5, 8, 7]  # heights 20 20 20 21 21 22 22 22 21
    data = made(9).subset(order)
    assert [s.name for s in data.samples] == [samples[i].name for i in order]
    batches = list(eval_batches(data, transform=EvalTransform(), batch_size=2, workers=workers))
    assert [batch.images.shape[0] for batch in batches] == [2, 1, 2, 2, 1, 1]
    assert [i for batch in batches for i in batch.indices] == list(range(9))
    for batch in batches:
        for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), data[index].image)
            np.testing.assert_array_equal(label.numpy(), data[index].label)


def test_eval_batches_of_ranks_have_no_duplicates():
    data = made(7)
    parts = [list(eval_batches(data, transform=EvalTransform(), rank=rank, world_size=3)) for rank in range(3)]
    assert [[i for b in part for i in b.indices] for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]


def test_eval_of_resized_images_keeps_the_labels_size():
    data = made(3)
    transform = EvalTransform(resize={"size": [10, 15]})
    batches = list(eval_batches(data, transform=transform, batch_size=3))
    assert [tuple(b.images.shape) for b in batches] == [(1, 3, 10, 15)] * 3  # labels of three heights
    assert [b.labels.shape[1] for b in batches] == [20, 21, 22]
    transform = EvalTransform(resize={"size": [10, 15]}, labels="resized")
    (batch,) = eval_batches(data, transform=transform, batch_size=3)
    assert batch.labels.shape == (3, 10, 15)


def test_unlabelled_split_can_be_predicted_on():
    (batch,) = list(eval_batches(made(1, labelled=False), transform=EvalTransform()))
    assert (batch.labels == 255).all()


def files(folder, *, image_size, label_size, suffix):
    """One smooth pair on disk."""
    y, x = np.mgrid[: image_size[0], : image_size[1]]
    image = np.dstack([x * 255 // image_size[1], y * 255 // image_size[0], 0 * x + 90]).astype(np.uint8)
    Image.fromarray(image).save(folder / f"0{suffix}", **({"quality": 98} if suffix == ".jpg" else {}))
    Image.fromarray(np.zeros(label_size, np.uint8)).save(folder / "0_label.png")
    sample = Sample(name="0", image=folder / f"0{suffix}", labels=(folder / "0_label.png",))
    return SampleSet([sample], table=TABLE, name="files", split="train")


def test_jpeg_is_decoded_small_where_that_is_fine_enough(tmp_path, monkeypatch):
    data = files(tmp_path, image_size=(200, 300), label_size=(200, 300), suffix=".jpg")
    transform = TrainTransform(crop=(40, 60), scale=(0.2, 0.2))
    asked: list[int] = []
    image = SampleSet.image

    def spy(self, index, *, shrink=1):
        asked.append(shrink)
        return image(self, index, shrink=shrink)

    monkeypatch.setattr(SampleSet, "image", spy)
    small = next(iter(load(data, transform=transform, batch_size=1)))
    monkeypatch.setattr(SampleSet, "shrinkable", lambda self, index: False)
    whole = next(iter(load(data, transform=transform, batch_size=1)))
    assert asked == [4, 1]
    assert (small.images.float() - whole.images.float()).abs().mean() < 1.5
    assert torch.equal(small.labels, whole.labels)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_half_sized_image_is_refused_also_where_half_size_would_do(tmp_path, suffix):
    data = files(tmp_path, image_size=(100, 150), label_size=(200, 300), suffix=suffix)
    transform = TrainTransform(crop=(40, 60), scale=(0.4, 0.4))
    with pytest.raises(InputError, match=r"image .* is 150x100 but its label .* is 300x200"):
        next(iter(load(data, transform=transform, batch_size=1)))


def test_a_spawned_worker_gets_the_same_batches():
    """Where fork is not to be had, the steps travel to the worker by pickle."""
    steps = load(made(10)).start.args[0]
    again = pickle.loads(pickle.dumps(steps))
    for step in (0, 3):
        assert torch.equal(again[step].images, steps[step].images)


def test_workers_run_on_one_thread():
    data = made(2, load_image=thread_counts)
    (batch,) = list(load(data, transform=TrainTransform(crop=(20, 30)), batch_size=1, num_steps=1, workers=1))
    assert batch.images.unique().tolist() == [1]


def thread_counts(sample):
    """An image whose grey value is the larger number of threads of OpenCV and torch."""
    import cv2

    threads = max(cv2.getNumThreads(), torch.get_num_threads())
    return np.full((*size_of(int(sample.name)), 3), threads, np.uint8)
