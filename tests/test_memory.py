"""Memory that is bounded ends in an error that can be told, not in a killed process."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from segkit import memory

CPU = torch.device("cpu")
MIB = 2**20

BIG = """
import torch
from segkit import memory
memory.available = lambda: memory.RESERVE + 400 * 2**20
with memory.bounded() as free:
    assert free == 400 * 2**20, free
    small = torch.empty(50 * 2**20, dtype=torch.uint8)
    try:
        torch.empty(2**30, dtype=torch.uint8)
    except Exception as error:
        print("out of memory", memory.is_out_of_memory(error))
again = torch.empty(2**30, dtype=torch.uint8)
print("free again", again.numel() == 2**30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the bound is Linux's")
def test_an_allocation_beyond_the_bound_is_an_error_and_the_bound_ends_with_the_context():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["out of memory True", "free again True"]


def test_nothing_is_bounded_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "_field", lambda path, name: None)
    with memory.bounded() as free:
        assert free is None


def test_a_container_bounds_what_is_available(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("400\n")
    monkeypatch.setattr(memory, "CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.total() == 1000
    assert memory.available() == memory.available(CPU) == 600
    (tmp_path / "max").write_text("max\n")
    assert memory.total() > 2**20
    assert memory.available() > 2**20


def test_what_is_available_is_estimated_where_the_system_does_not_tell(monkeypatch):
    ask = os.sysconf
    known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"}  # as on macOS, which raises ValueError for another name
    monkeypatch.setattr(os, "sysconf", lambda name: ask(name if name in known else "SC_NOPE"))
    monkeypatch.setattr(memory, "_field", lambda path, name: None)
    monkeypatch.setattr(memory, "_containers", list)
    assert memory.total() // 2 < memory.available() < memory.total()


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_errors_of_memory_are_known(error, known):
    assert memory.is_out_of_memory(error) is known


def failure_of(function) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(2**56, dtype=torch.uint8), lambda: np.empty(2**56, np.uint8), lambda: b"1" * 2**60]
)
def test_real_failures_to_allocate_are_recognised(allocate):
    assert memory.is_out_of_memory(failure_of(allocate))


def test_gpu_failures_are_recognised_and_others_are_not():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(cv2.error) as failed:
        cv2.resize(np.zeros((8, 8, 3), np.uint8), (2**20, 2**20))
    assert memory.is_out_of_memory(failed.value)
    assert not memory.is_out_of_memory(ValueError("not enough memory"))


def test_the_peak_is_measured_though_the_memory_is_given_back():
    memory.give_back()  # as measuring does: what is kept of earlier work is none of it
    before = memory.held()
    with memory.measuring(CPU) as measured:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)
        del block
    assert measured.bytes >= before + 60 * MIB
    assert memory.peak(CPU) >= measured.bytes - 8 * MIB


def test_what_was_kept_is_given_back_before_a_peak_is_measured(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_back", lambda: given.append(True))
    with memory.measuring(CPU):
        assert given == [True]


def test_available_memory_shrinks_with_what_is_taken():
    free = memory.available(CPU)
    assert 0 < free < 2**50


def test_levers_leave_out_what_is_pulled_already():
    config = {"batch_size": 6, "accumulate": 2, "dataset": {"crop": [512, 512]}, "precision": "fp32"}
    assert memory.training_levers(config) == (
        "grad_checkpointing=light, or accumulate=3 (2 of 6 images at once), or a smaller dataset.crop than [512, 512]"
    )
    assert memory.training_levers({**config, "grad_checkpointing": "light"}).startswith("grad_checkpointing=mixed, or")
    assert memory.training_levers({**config, "grad_checkpointing": "mixed"}).startswith("grad_checkpointing=true, or")
    used = {**config, "grad_checkpointing": True, "accumulate": 6}
    assert memory.training_levers(used) == (
        "a smaller dataset.crop than [512, 512], or precision=bf16, or a smaller batch_size than 6"
    )
    assert memory.training_levers({"grad_checkpointing": True, "precision": "bf16"}) == "a smaller dataset.crop"
    assert memory.evaluation_levers({"precision": "bf16"}) == "dataset.eval_resize.short_side=..."
