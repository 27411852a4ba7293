"""Which files of a folder are images, and what a user's text file holds."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image

from segkit.data import open_dataset
from segkit.data.bands import image_size
from segkit.data.decode import read_index_png, read_rgb
from segkit.data.files import IMAGE_SUFFIXES, find_images, read_bytes, read_text, walk
from segkit.data.statistics import count_labels
from segkit.errors import InputError
from segkit.files import held, write_atomically
from segkit.guard import explain
from segkit.synthetic.sample_maker import make_sample


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")


def names(folder, files):
    return [path.relative_to(folder).as_posix() for path in files]


def test_results_are_told_apart_without_comparing_every_two_files(tmp_path, monkeypatch):
    files = [tmp_path / folder / f"{number}.png" for folder in ("out", "shots") for number in range(200)]
    monkeypatch.setattr("segkit.data.files.walk", lambda *_: files)
    compared, equal = [], PurePath.__eq__
    monkeypatch.setattr(PurePath, "__eq__", lambda *pair: compared.append(1) or equal(*pair))
    assert list(find_images(tmp_path, output=tmp_path / "out").values()) == files[200:]
    assert len(compared) < 50 * len(files)


def test_files_are_found_by_folder_pattern_and_name(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "x/y/c.PNG", "x/d.txt", "x/out/labels/a.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")
    source = tmp_path / "x"
    found = find_images(source, output=source / "out")
    assert {name: path.relative_to(source).as_posix() for name, path in found.items()} == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "y/c": "y/c.PNG",
    }
    (source / "a.png.png").write_bytes(b"-")
    assert set(find_images(source, output=source / "out")) == {"a.jpg", "a.png", "a.png.png", "y/c"}
    assert list(find_images(source / "*.jpg")) == ["a"]
    assert list(find_images(str(source / "**/c.*"))) == ["c"]
    assert list(find_images(source / "d.txt")) == ["d"]  # named by the user: tried
    brackets = tmp_path / "[1] shots*"
    (brackets / "b").mkdir(parents=True)
    (brackets / "b" / "e.png").write_bytes(b"-")
    assert list(find_images(brackets / "b" / "*.png")) == list(find_images(brackets / "**" / "*.png")) == ["e"]
    with pytest.raises(InputError, match=r"no image matches .*\*\.gif; give a file, a pattern in quotes, or a folder"):
        find_images(source / "*.gif")
    with pytest.raises(InputError, match=r"all images of .*out lie below .*out, where the results go: give another"):
        find_images(source / "out", output=source / "out")


def test_a_file_of_the_longest_name_is_written_and_an_interrupted_one_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / ("ü" * 125 + ".html")
    write_atomically(path, "whole")
    assert path.read_text() == "whole"

    def interrupted(descriptor):
        assert list(tmp_path.glob("*.html")) == [path], "a part would be taken for a file of its kind"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "half")
    assert [item.read_text() for item in tmp_path.iterdir()] == ["whole"]


def test_a_disk_that_fails_is_named_with_the_file(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomically(tmp_path / "x.json", "x")
    assert explain(caught.value)[0].startswith(f"{tmp_path / 'x.json'} cannot be used (Input/output error): mend it")
    assert not list(tmp_path.iterdir())
    sentence = "a file cannot be read or written ([Errno 27] File too large): look at the disks of the data, hydra.run."
    assert explain(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))[0].startswith(sentence)


def test_a_disk_that_knows_no_locks_is_named_with_the_folder(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fails)
    sentence = r"^x is .*run, .*no file can be locked \(No locks available\): set another x"
    with pytest.raises(InputError, match=sentence), held(tmp_path / "run", doing="trains in", key="x"):
        pass
    assert not list(tmp_path.iterdir())


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(*(tmp_path / name for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "b/.c/d.png", "b/e.JPG")))
    assert names(tmp_path, walk(tmp_path, IMAGE_SUFFIXES)) == ["a.png", "b/e.JPG"]
    assert list(find_images(tmp_path)) == ["a", "b/e"]
    assert list(find_images(tmp_path / "**" / "*.*")) == ["a", "b/e"]


def test_links_that_lead_back_neither_loop_nor_repeat_files(tmp_path):
    top = tmp_path / "root" / "images" / "train"
    touch(top / "a.png", top / "b" / "c.png", tmp_path / "root" / "labels" / "a.png", tmp_path / "disk" / "d.png")
    (top / "0_again").symlink_to(top, target_is_directory=True)
    (top / "0_same").symlink_to(top / "b", target_is_directory=True)
    (top / "0_up").symlink_to(tmp_path / "root", target_is_directory=True)
    (top / "elsewhere").symlink_to(tmp_path / "disk", target_is_directory=True)
    (top / "e.png").symlink_to(tmp_path / "disk" / "d.png")
    expected = ["a.png", "b/c.png", "e.png", "elsewhere/d.png"]
    assert names(top, walk(top, IMAGE_SUFFIXES)) == expected
    assert [path.relative_to(top).as_posix() for path in find_images(top).values()] == expected
    assert names(top, find_images(top / "**" / "*.png").values()) == expected
    link = tmp_path / "link"
    link.symlink_to(top, target_is_directory=True)
    assert names(link, walk(link, IMAGE_SUFFIXES)) == expected, "a folder that is a link itself"


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    assert walk(tmp_path) == [tmp_path / "a.png"]
    assert find_images(tmp_path) == find_images(tmp_path, output=tmp_path / "out") == {"a": tmp_path / "a.png"}
    with pytest.raises(InputError, match=r"image .*a\.png cannot be read: Too many levels of symbolic links"):
        read_bytes(tmp_path / "a.png", role="image")


def test_names_that_are_no_utf_8_get_a_sentence(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        open(path, "wb").close()
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(InputError, match=r"the name of caf\\xe9\.png in folder .* is no UTF-8, .*; rename it"):
        find_images(tmp_path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "locked" / "a.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        InputError, match=r"folder .*locked may not be read by this user; run `chmod -R u\+rX .*locked`"
    ):
        walk(tmp_path, IMAGE_SUFFIXES)


@pytest.fixture(params=["pipe", "socket", "device"])
def odd_entry(request, tmp_path):
    """What an entry named like an image may be, and the word for it."""
    path = tmp_path / "odd.png"
    if request.param == "pipe":
        os.mkfifo(path)
        return path, r"a pipe \(FIFO\)"
    if request.param == "device":
        path.symlink_to("/dev/zero")
        return path, "a device"
    server = socket.socket(socket.AF_UNIX)
    monkey = os.getcwd()
    os.chdir(tmp_path)  # the name of a socket may have about 100 bytes
    server.bind("odd.png")
    os.chdir(monkey)
    server.close()
    return path, "a socket"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [read_rgb, read_index_png, image_size])
def test_pipes_and_devices_are_never_opened(odd_entry, read):
    path, kind = odd_entry
    assert list(find_images(path.parent)) == list(find_images(path)) == ["odd"], "its sentence comes when it is read"
    with pytest.raises(InputError, match=rf"odd\.png is {kind}, but a regular file is wanted; remove it"):
        read(path)


@pytest.mark.timeout(60)
def test_a_pipe_in_a_data_set_is_refused_before_anything_is_counted(tmp_path):
    root = make_sample("folder", tmp_path / "own", num_images=2)
    (root / "images" / "train" / "0001.jpg").unlink()
    os.mkfifo(root / "images" / "train" / "0001.jpg")
    data = open_dataset("folder", root=root, split="train")
    with pytest.raises(InputError, match=r"0001\.jpg is a pipe \(FIFO\)"):
        count_labels(data, workers=0)
    os.mkfifo(root / "val.txt")
    assert len(open_dataset("folder", root=root, split="val")) > 0, "a pipe is no list"


def test_texts(tmp_path):
    path = tmp_path / "x.txt"
    for content in (b"\xef\xbb\xbf\xc3\xa4\r\nb\rc\n", "ä\nb\nc\n".encode()):
        path.write_bytes(content)
        assert read_text(path, role="list", missing="") == "ä\nb\nc\n"
    path.write_bytes(b"")
    assert read_text(path, role="list", missing="") == ""
    for content, kind in (
        (b"caf\xe9\n", r"byte 0xe9 at position 3; perhaps Latin-1"),
        ("ä".encode("utf-16"), "UTF-16"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"list .*x\.txt is no text in UTF-8 \(.*{kind}\): save it as UTF-8"):
            read_text(path, role="list", missing="")
    with pytest.raises(InputError, match="write one"):
        read_text(tmp_path / "gone", role="list", missing="write one")
    with pytest.raises(InputError, match=r"list .* cannot be read: File name too long"):
        read_text(tmp_path / ("n" * 300), role="list", missing="write one")
    with pytest.raises(InputError, match=r"list .* is a folder, but a file is wanted"):
        read_text(tmp_path, role="list", missing="")


def test_training_sees_no_hidden_folder_and_no_link_that_leads_back(tmp_path):
    root = make_sample("folder", tmp_path / "own", num_images=3)
    for kind, end in (("images", "jpg"), ("labels", "png")):
        folder = root / kind / "train"
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / f"0000-checkpoint.{end}").write_bytes(b"-")
        (folder / "again").symlink_to(root, target_is_directory=True)
        (folder / f"._0000.{end}").write_bytes(b"-")
    assert [sample.name for sample in open_dataset("folder", root=root, split="train").samples] == [
        "0000",
        "0001",
        "0002",
    ]


def test_a_decoded_image_of_a_link_is_that_of_its_file(tmp_path):
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert read_rgb(tmp_path / "b.png").shape == (3, 4, 3)
