"""Checkpoints after a crash at every moment of writing one."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from segkit.errors import InputError
from segkit.files import digest_of, held
from segkit.guard import _leave_os_errors
from segkit.training import checkpoint


def state(step: int) -> dict:
    return {"model": {"weight": torch.full((50,), float(step))}, "ema": None, "progress": {"step": step}}


def step_of(folder: Path) -> int:
    loaded = checkpoint.load_last(folder)
    assert loaded is not None
    assert torch.equal(loaded["model"]["weight"], torch.full((50,), float(loaded["progress"]["step"])))
    return loaded["progress"]["step"]


def test_the_last_and_the_one_before_are_kept(tmp_path):
    assert checkpoint.load_last(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save_last(tmp_path, state(step))
    assert step_of(tmp_path) == 3
    assert checkpoint.load(tmp_path / "previous.pt")["progress"]["step"] == 2


def test_who_reads_while_training_writes_gets_one_whole_checkpoint(tmp_path, monkeypatch):
    """Another is written between the moment when the file is opened and that when checksums.json is read."""
    last, listed, rename = tmp_path / "last.pt", checkpoint._checksums, Path.replace
    checkpoint.save_last(tmp_path, state(1))
    written = []

    def meanwhile(folder):
        if not written:
            written.append(True)
            checkpoint.save_last(tmp_path, state(2))
        return listed(folder)

    def there(self, target):
        assert last.is_file()
        return rename(self, target)

    monkeypatch.setattr(checkpoint, "_checksums", meanwhile)
    monkeypatch.setattr(Path, "replace", there)
    digest = digest_of(last)
    found = checkpoint.load(last)
    assert (found["progress"]["step"], found["digest"]) == (1, digest)
    found = checkpoint.load(last)
    assert (found["progress"]["step"], found["digest"]) == (2, digest_of(last))


def test_a_torn_file_is_passed_over_with_a_warning(tmp_path):
    for step in (1, 2):
        checkpoint.save_last(tmp_path, state(step))
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"last.pt is torn: going on from .*previous.pt"):
        assert step_of(tmp_path) == 1


def test_one_flipped_bit_is_noticed(tmp_path):
    for step in (1, 2):
        checkpoint.save_last(tmp_path, state(step))
    last = tmp_path / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="torn"):
        assert step_of(tmp_path) == 1


def test_both_torn_is_an_error(tmp_path):
    for step in (1, 2):
        checkpoint.save_last(tmp_path, state(step))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        checkpoint.load_last(tmp_path)


class Killed(BaseException):
    pass


def no_links(*arguments):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("moment", range(6))
def test_dying_at_any_moment_of_a_write_costs_one_interval_at_most(tmp_path, monkeypatch, moment, links):
    """Every rename and every flush is a moment to die at, again in the next write; after each, a whole checkpoint is
    found and training goes on to write further ones."""
    checkpoint.save_last(tmp_path, state(1))
    checkpoint.save_last(tmp_path, state(2))
    rename = Path.replace
    found = 2
    for step in (3, 4):
        calls = itertools.count()

        def dying(self, target, calls=calls):
            if next(calls) == moment:
                raise Killed
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", dying)
        if not links:
            monkeypatch.setattr(os, "link", no_links)
        try:
            checkpoint.save_last(tmp_path, state(step))
            died = False
        except Killed:
            died = True
        monkeypatch.undo()
        # data, checksums, last to previous where no link can be, new to last
        assert died == (moment < (3 if links else 4))
        before, found = found, step_of(tmp_path)
        assert found in (before, step)
    for step in (5, 6):
        checkpoint.save_last(tmp_path, state(step))
        assert step_of(tmp_path) == step
    (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="torn"):
        assert step_of(tmp_path) == 5


def test_a_full_disk_leaves_the_last_one_alone(tmp_path, monkeypatch):
    checkpoint.save_last(tmp_path, state(1))

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*free some space"):
        checkpoint.save_last(tmp_path, state(2))
    monkeypatch.undo()
    assert step_of(tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_fails_is_named_by_the_file_that_was_written(tmp_path, monkeypatch):
    """Nothing can be removed on it either, which must not hide the first error."""

    def fails(*arguments, **keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    def train():
        with held(tmp_path / "run", doing="trains in", key="x"):
            monkeypatch.setattr(Path, "unlink", fails)
            monkeypatch.setattr(os, "fsync", fails)
            checkpoint.write(tmp_path / "last.pt", state(1))

    with pytest.raises(OSError, match=r"the checkpoint .*last\.pt could not be written \(.*Read-only file system"):
        train()


def test_a_thread_that_a_disk_fails_shows_no_traceback(monkeypatch, capsys):
    """That of TensorBoard's event file, for example: whoever writes to it next is told."""
    monkeypatch.setattr(threading, "excepthook", _leave_os_errors)

    def fails(error):
        raise error

    for error in (OSError(errno.ENOSPC, "full"), KeyError("ours")):
        thread = threading.Thread(target=fails, args=(error,))
        thread.start()
        thread.join()
    shown = capsys.readouterr().err
    assert "KeyError: 'ours'" in shown
    assert "full" not in shown


def test_objects_are_refused(tmp_path):
    torch.save({"model": Killed}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "nowhere.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="has no entry 'model'"):
        checkpoint.load(tmp_path / "other.pt")


def test_weights_of_another_model_say_what_differs(tmp_path):
    with pytest.raises(InputError, match=r"weight has shape \(3, 2\) instead of \(5, 2\)"):
        checkpoint.load_weights(nn.Linear(2, 5), nn.Linear(2, 3).state_dict(), source=tmp_path)
    with pytest.raises(InputError, match=r"1 entries missing, 0 unknown.*bias is missing"):
        checkpoint.load_weights(nn.Linear(2, 3), nn.Linear(2, 3, bias=False).state_dict(), source=tmp_path)


def test_weights_prefer_the_moving_average():
    assert checkpoint.weights({"model": {"a": 1}, "ema": {"a": 2}}) == {"a": 2}
    assert checkpoint.weights({"model": {"a": 1}, "ema": None}) == {"a": 1}
    assert checkpoint.weights({"model": {"a": 1}}) == {"a": 1}
