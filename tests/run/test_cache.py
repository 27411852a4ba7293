"""The cache of finished phases: what its keys depend on, and that nothing damaged or half done comes out of it."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from segkit.config.compose import compose
from segkit.config.schema import Config, cache_dir_of
from segkit.errors import InputError
from segkit.run.cache import PhaseCache, code_version, phase_key

PRINTS = {name: {"train": "t", "val": "v"} for name in ("pretrain", "finetune")}
MACHINE = {"threads": 2}


def key(*overrides: str, phase: str = "pretrain", prints=PRINTS, machine=MACHINE) -> str:
    return phase_key(composed(*overrides), phase, fingerprints=prints, machine=machine)


@functools.cache
def composed(*overrides: str) -> Config:
    return compose(["schedule=pretrain_finetune", "model=deeplabv3plus_tiny", *overrides])


@pytest.mark.parametrize(
    ("place", "folder"),
    [("s3://a/b", None), ("~nobody_there/x", None), ("~/x", "home/x"), ("", "home/.cache/segkit"), ("a", "a")],
)
def test_the_variable_names_a_folder_of_this_machine(monkeypatch, place, folder):
    monkeypatch.setenv("HOME", "home")
    monkeypatch.setenv("SEGKIT_CACHE", place)
    if folder is None:
        with pytest.raises(InputError, match=rf"^the cache would be {place}, which is no folder of this machine: set"):
            cache_dir_of(compose([]))
    else:
        assert cache_dir_of(compose([])) == Path(folder)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "precision=bf16",
        "determinism=strict",
        "batch_size=4",
        "accumulate=2",
        "clip_norm=1",
        "ema_decay=0.9",
        "encoder_lr_factor=0.1",
        "channels_last=true",
        "limit_steps=3",
        "optimizer.lr=0.5",
        "optimizer=sgd",
        "model.decoder_channels=32",
        "dataset.crop=[64,64]",
        "dataset.flip=0",
        "dataset.reader.num_images=5",
        "evaluation.max_images=3",
        "schedule.pretrain.epochs=3",
        "schedule.pretrain.lr=0.1",
        "schedule.pretrain.loss.label_smoothing=0.1",
    ],
)
def test_a_key_that_changes_the_phase_changes_its_hash(override):
    assert key(override) != key()


@pytest.mark.parametrize(
    "override",
    [
        "workers=0",
        "cache_dir=/somewhere",
        "checkpoint_every=7",
        "resume=false",
        "auto_batch=true",
        "loss.tau=3",
        "loss=lovasz_softmax",
        "schedule.finetune.epochs=3",
        "schedule.finetune.lr=0.1",
        "dataset.root=/elsewhere",
        "dataset.recipe.finetune_epochs=9",
    ],
)
def test_a_key_of_something_else_does_not(override):
    assert key(override) == key()


def test_data_machine_and_ancestors_count():
    assert key(prints={**PRINTS, "pretrain": {"train": "other", "val": "v"}}) != key()
    assert key(prints={**PRINTS, "pretrain": {"train": "t", "val": "other"}}) != key()
    assert key(prints={**PRINTS, "finetune": {"train": "other", "val": "v"}}) == key()
    assert key(machine={"threads": 4}) != key()
    assert key("schedule.pretrain.epochs=3", phase="finetune") != key(phase="finetune")


def test_the_content_of_initial_weights_counts(tmp_path):
    weights = tmp_path / "weights.pt"
    hashes = set()
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        hashes |= {key(f"{name}={weights}") for name in ("init_from", "model.weights", "model.encoder_weights")}
    assert len(hashes) == 6


def test_code_is_part_of_the_version(monkeypatch):
    before = code_version()
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + (b"#" if path.name == "margins.py" else b""))
    assert code_version() != before


@pytest.fixture
def cache(tmp_path) -> PhaseCache:
    cache = PhaseCache(tmp_path / "cache")
    cache.check()
    return cache


def finished(cache: PhaseCache, folder: Path, key: str = "k") -> Path:
    cache.mark(key, folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.pt").write_bytes(b"weights" * 1000)
    (folder / "results.json").write_text("{}")
    return folder


def test_what_is_stored_comes_back(cache, tmp_path):
    source = finished(cache, tmp_path / "a")
    assert not cache.fetch("k", tmp_path / "b")
    (source / "failure-0000003").mkdir()  # of a step of this run, that was mended since
    cache.store("k", source)
    (source / "failure-0000003").rmdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "stale.txt").write_text("from a run that was killed")
    assert cache.fetch("k", tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").rglob("*")} == {path.name for path in source.rglob("*")}
    assert (tmp_path / "b/checkpoints/last.pt").read_bytes() == b"weights" * 1000
    assert not cache.fetch("other", tmp_path / "c")


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_a_damaged_entry_is_thrown_away_with_a_warning(cache, tmp_path, damage):
    cache.store("k", finished(cache, tmp_path / "a"))
    last = cache.folder / "k" / "files" / "checkpoints" / "last.pt"
    if damage == "flip":
        last.write_bytes(b"w" + b"weights" * 1000)
    elif damage == "cut":
        last.write_bytes(last.read_bytes()[:-1])
    elif damage == "delete":
        last.unlink()
    else:
        (cache.folder / "k" / "manifest.json").write_text('{"torn')
    with pytest.warns(UserWarning, match=r"k is damaged \((checkpoints/last.pt|manifest.json)\): the phase is trained"):
        assert not cache.fetch("k", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert not (cache.folder / "k").exists()
    cache.store("k", tmp_path / "a")
    assert cache.fetch("k", tmp_path / "b")


def test_a_phase_that_began_under_another_key_is_not_kept(cache, tmp_path):
    """A run that went on with ignore_config_change, or after the code changed, is neither one nor the other."""
    cache.store("new", finished(cache, tmp_path / "a", key="old"))
    assert not cache.fetch("new", tmp_path / "b")
    unmarked = tmp_path / "c"
    unmarked.mkdir()
    cache.store("new", unmarked)
    assert not cache.fetch("new", tmp_path / "b")


def test_a_full_disk_is_told_and_does_no_harm(cache, tmp_path, monkeypatch):
    source = finished(cache, tmp_path / "a")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.warns(UserWarning, match=r"the phase could not be kept in .*phases .*No space left"):
        cache.store("k", source)
    monkeypatch.undo()
    assert not cache.fetch("k", tmp_path / "b")


def test_a_lock_is_held_by_one_and_returned_by_the_dead(cache, tmp_path):
    mine, theirs = cache.lock("k"), cache.lock("k")
    assert cache.acquire(mine)
    assert not cache.acquire(theirs, seconds=0)
    cache.offer("k", finished(cache, tmp_path / "a"))  # another holds the lock: nothing happens
    assert not (cache.folder / "k").exists()
    mine.release()
    cache.offer("k", tmp_path / "a")
    assert (cache.folder / "k").exists()
    child = os.fork()
    if child == 0:
        cache.acquire(cache.lock("k"))
        os._exit(0)  # without releasing it
    os.waitpid(child, 0)
    assert cache.acquire(theirs, seconds=1)
    theirs.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cache_dir is .*file/cache, where nothing can be written .*set cache_dir=DIR"
    ):
        PhaseCache(tmp_path / "file" / "cache").check()
