"""The golden trace: losses and scores of a tiny run, which a refactor must leave as they are.

``make golden`` writes it anew. Between processors the last digits differ, hence the tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segkit.config.compose import compose
from segkit.run.splits import open_phases

TRACE = Path(__file__).parent / "golden" / "synthetic.json"
OVERRIDES = [
    "dataset=synthetic",
    "loss=margin_calibration",
    "schedule=pretrain_finetune",
    "debug=smoke",
    "determinism=strict",
    "device=cpu",
    "batch_size=2",
    "dataset.crop=[64,96]",
    "dataset.recipe.lr=1e-4",
    "loss.scale=mean",  # so few images would have margins of many logits
    "loss.mean_margin=0.1",
    "dataset.reader.num_images=16",
    "dataset.reader.size=[96,128]",
]


def trace(folder: Path) -> list[dict]:
    """One entry a record: phase, step, and the loss or the mean IoU."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("phase", "step", "split", "loss", "mean_iou", "pixel_accuracy")
    return [{key: record[key] for key in keys if key in record} for record in records]


@pytest.mark.filterwarnings("ignore:very few training pixels:UserWarning")  # said on purpose: so few images
@pytest.mark.filterwarnings("ignore:no training pixel:UserWarning")
def test_golden_trace(tmp_path, request):
    import torch

    from segkit.run import pipeline

    torch.set_num_threads(1)  # the order of sums depends on the number of threads
    config = compose([*OVERRIDES, f"cache_dir={tmp_path}/cache"])
    pipeline.run(config, tmp_path / "run", open_phases(config))
    ours = trace(tmp_path / "run")
    if request.config.getoption("--write-golden"):
        TRACE.parent.mkdir(exist_ok=True)
        TRACE.write_text(json.dumps(ours, indent=1) + "\n")
        return
    golden = json.loads(TRACE.read_text())
    assert len(ours) == len(golden)
    for mine, theirs in zip(ours, golden, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            tolerant = pytest.approx(value, rel=2e-3, abs=2e-3) if isinstance(value, float) else value
            assert mine[key] == tolerant, (key, theirs)
