"""Memory that is bounded ends in an error that can be told, not in a killed process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from segkit import memory

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
        print("exhausted", memory.is_exhausted(error))
again = torch.empty(2**30, dtype=torch.uint8)
print("free again", again.numel() == 2**30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the bound is Linux's")
def test_an_allocation_beyond_the_bound_is_an_error_and_the_bound_ends_with_the_context():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["exhausted True", "free again True"]


def test_nothing_is_bounded_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    with memory.bounded() as free:
        assert free is None


def test_a_container_bounds_what_is_available(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("400\n")
    monkeypatch.setattr(memory, "CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.total() == 1000
    assert memory.available() in (600, None)
    (tmp_path / "max").write_text("max\n")
    assert memory.total() > 2**20


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
    assert memory.is_exhausted(error) is known
