"""The loss table: what the contract tests measured, one row per loss (option ``--loss-table`` of tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

POINTS = {
    "perfect": "perfect prediction",
    "void": "void pixels",
    "symmetry": "permutations, shift",
    "all_void": "all void",
    "one_pixel": "one pixel",
    "read_only": "inputs untouched",
    "gradcheck": "gradient",
    "half": "bf16 / fp16",
    "duplicate": "batch twice",
    "absent": "absent class",
    "two_classes": "K = 2",
    "non_finite": "NaN, inf",
}
_cells: dict[str, dict[str, str]] = {}


@pytest.fixture
def record(request):
    """record(loss, point, text): the cell of the loss table, kept only if the test that calls it last passes."""

    def keep(loss: str, point: str, text: str) -> None:
        assert point in POINTS
        _cells.setdefault(loss, {})[point] = text

    return keep


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--loss-table")
    if path is None or not _cells:
        return
    if exitstatus != 0:
        print(f"\nthe loss contract failed: {path} is left as it was")
        return
    lines = [
        "| loss | " + " | ".join(POINTS.values()) + " |",
        "|---" * (len(POINTS) + 1) + "|",
        *(f"| {name} | " + " | ".join(cells.get(p, "") for p in POINTS) + " |" for name, cells in _cells.items()),
    ]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
