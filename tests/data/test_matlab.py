"""MATLAB files: what scipy reads is read alike, and no byte that is wrong does more than a sentence."""

import struct

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import csc_matrix

from segkit.data.matlab import read_mat
from segkit.data.readers import cocostuff10k, voc
from segkit.data.samples import Sample
from segkit.errors import InputError

NUMBERS = np.arange(24).reshape(4, 6) % 20
TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def label_file(path, **changes):
    """A file with a label map, the names of 182 classes, and a mask of SBD."""
    names = np.array([[f"class {number}"] for number in range(182)], object)
    content = {"S": NUMBERS.astype(float), "names": names, "GTcls": {"Segmentation": NUMBERS.astype(np.uint8)}}
    savemat(path, {**content, **changes})
    return path


@pytest.mark.parametrize("deflated", [True, False])
def test_variables_are_those_that_scipy_reads(tmp_path, deflated):
    path, cells = tmp_path / "a.mat", np.array([["a", NUMBERS, csc_matrix(NUMBERS)]], object)
    numbers = {f"n{kind}": (NUMBERS - 3).astype(kind) for kind in TYPES} | {"cube": np.ones((2, 3, 4)), "one": 3}
    others = {"text": "S", "sparse": csc_matrix(NUMBERS), "complex": NUMBERS + 1j, "empty": np.zeros((0, 0))}
    inner = {"a": NUMBERS, "Segmentation": NUMBERS.T, "cells": cells}
    savemat(path, {**numbers, **others, "cells": cells, "GTcls": inner}, do_compression=deflated)
    names = [*numbers, *others, "cells", "GTcls"]
    found, wanted = read_mat(path, [*names, "other"]), loadmat(path)
    assert list(found) == names
    for name in [*numbers, "empty"]:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].shape == wanted[name].shape
        np.testing.assert_array_equal(found[name], wanted[name])
    assert [found[name] for name in ("text", "sparse", "complex")] == [None] * 3
    assert len(found["cells"]) == 3
    assert list(found["GTcls"]) == ["a", "Segmentation", "cells"]
    np.testing.assert_array_equal(found["GTcls"]["Segmentation"], NUMBERS.T)
    assert list(read_mat(path, ["one"])) == ["one"]


def test_a_file_of_a_machine_with_the_high_byte_first_is_read(tmp_path):
    """Written by hand from the published format: no library writes one."""

    def element(kind, content):
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    numbers = NUMBERS.astype(">u2")
    parts = [(6, struct.pack(">II", 6, 0)), (5, struct.pack(">ii", *NUMBERS.shape)), (4, numbers.tobytes(order="F"))]
    flags, dims, content = (element(*part) for part in parts)
    matrix = flags + dims + struct.pack(">HH4s", 1, 1, b"S") + content  # a name of one letter stands in the tag
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\1\0MI" + element(14, matrix))
    found = read_mat(tmp_path / "a.mat", ["S"])["S"]
    np.testing.assert_array_equal(found, NUMBERS)
    assert found.dtype == np.uint16


@pytest.mark.parametrize("deflated", [True, False])
def test_a_file_is_cut_off_unless_it_ends_behind_a_variable(tmp_path, deflated):
    path = tmp_path / "a.mat"
    savemat(path, {"S": NUMBERS.astype(float), "names": np.array(["a", "bb"], object)}, do_compression=deflated)
    content, ends = path.read_bytes(), [128]
    while ends[-1] < len(content):
        ends.append(ends[-1] + 8 + struct.unpack_from("<I", content, ends[-1] + 4)[0])
    for length in range(1, len(content) + 1):
        path.write_bytes(content[:length])
        if length in ends:
            assert list(read_mat(path, ["S", "names"])) == ["S", "names"][: ends.index(length)]
        else:
            with pytest.raises(InputError, match="is damaged or no MATLAB file"):
                read_mat(path, ["S", "names"])


def test_a_wrong_byte_is_one_sentence_or_another_number(tmp_path):
    """Some of these files end scipy's process with a segmentation fault."""
    path = label_file(tmp_path / "a.mat", names=np.array([["a"], ["b"]], object))
    content = path.read_bytes()
    damaged = 0
    for place in range(128, len(content)):
        for wrong in (0, 14, 255, content[place] ^ 8):
            path.write_bytes(content[:place] + bytes([wrong]) + content[place + 1 :])
            try:
                read_mat(path, ["S", "names", "GTcls"])
            except InputError as error:
                damaged += "is damaged or no MATLAB file" in str(error)
    assert damaged > 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"S": np.array([["a"]], object)}, r"a\.mat has no label map S"),
        ({"S": csc_matrix(NUMBERS)}, r"a\.mat has no label map S"),
        ({"S": NUMBERS * np.nan}, r"a\.mat has label values that are not whole numbers"),
        ({"names": NUMBERS}, r"a\.mat names 0 classes, but files of version 1.1 name 182"),
        ({"GTcls": "text"}, r"a\.mat has no field GTcls.Segmentation"),
        ({"GTcls": np.array([["a", "b"]], object)}, r"a\.mat has no field GTcls.Segmentation"),
        ({"GTcls": {"Segmentation": {"x": 1}}}, r"a\.mat has no field GTcls.Segmentation"),
        ({"GTcls": {"Segmentation": NUMBERS / 2}}, r"segmentation of shape \(4, 6\) and type float64"),
    ],
)
def test_variables_of_another_kind_are_named(tmp_path, changes, message):
    path = label_file(tmp_path / "a.mat", **changes)
    read = voc.read_sbd_mask if "GTcls" in changes else cocostuff10k.read_label
    with pytest.raises(InputError, match=message):
        read(path if "GTcls" in changes else Sample("a", path, (path,)))
