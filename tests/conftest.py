"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# Small tensors: more threads only cost, and several test processes would fight for the cores.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)  # of the processes that tests start, too

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the golden traces instead of comparing")
    parser.addoption("--loss-table", default=None, metavar="FILE", help="write the loss contract table to FILE")


@pytest.fixture(autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets (``$SEGKIT_DATA`` or ``../shared/data``); skips where there is none."""
    folder = Path(os.environ.get("SEGKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "CamVid").is_dir():
        pytest.skip(f"real data sets are not at {folder} (set SEGKIT_DATA)")
    return folder
