"""Memory: what is measured, what counts as running out, what is advised."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segkit.training import memory

CPU = torch.device("cpu")
MIB = 2**20


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
    assert not memory.is_out_of_memory(ValueError("not enough memory"))


def test_the_peak_is_measured_though_the_memory_is_given_back():
    before = memory.resident()
    with memory.measuring(CPU) as measured:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)
        del block
    assert measured.bytes >= before + 60 * MIB
    assert memory.peak(CPU) >= measured.bytes - 8 * MIB


def test_available_memory_shrinks_with_what_is_taken():
    free = memory.available(CPU)
    assert 0 < free < 2**50


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "max").write_text(f"{100 * MIB}\n")
    (tmp_path / "current").write_text(f"{70 * MIB}\n")
    monkeypatch.setattr(memory, "CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.available(CPU) == 30 * MIB
    (tmp_path / "max").write_text("max\n")
    assert memory.available(CPU) > 30 * MIB


def test_levers_leave_out_what_is_pulled_already():
    config = {"batch_size": 6, "accumulate": 2, "dataset": {"crop": [512, 512]}, "precision": "fp32"}
    assert memory.training_levers(config) == (
        "grad_checkpointing=true, or accumulate=3 (2 of 6 images at once), or a smaller dataset.crop than [512, 512]"
    )
    used = {**config, "grad_checkpointing": True, "accumulate": 6}
    assert memory.training_levers(used) == (
        "a smaller dataset.crop than [512, 512], or precision=bf16, or a smaller batch_size than 6"
    )
    assert memory.evaluation_levers({"precision": "bf16"}) == "dataset.eval_resize.short_side=..."
