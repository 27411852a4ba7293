"""The trainer against a hand-written loop, and against itself after every kind of stop."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segkit.runtime import derive_seed
from segkit.training import checkpoint
from segkit.training.failure import NonFiniteLoss
from segkit.training.optim import lr_factor, parameter_groups
from segkit.training.precision import Mixed
from segkit.training.tracking import Tracker
from segkit.training.trainer import Interrupted, Settings, Trainer

CPU = torch.device("cpu")


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    names: list
    indices: list


def make_batches(start: int, stop: int = 10_000):
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (4, 8, 8), generator=generator, dtype=torch.uint8)
        labels[torch.rand(4, 8, 8, generator=generator) < 0.2] = 255
        labels[0, step % 8 :] = 255  # parts with different numbers of valid pixels
        yield Batch(images, labels, [f"image{step}-{i}" for i in range(4)], list(range(4)))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.2, batchnorm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images):
        return self.head(self.dropout(F.relu(self.norm(self.encoder(images.float() / 255)))))


class MeanCrossEntropy(nn.Module):
    pixel_decomposable = True

    def denominator(self, target):
        return (target != 255).sum().float()

    def forward(self, logits, target, *, denominator=None):
        total = F.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum")
        return total / (self.denominator(target) if denominator is None else denominator)


def build(
    folder, *, net=None, loss=None, precision="fp32", validate=None, ema_decay=None, stop=lambda: False, **numbers
):
    net = net or Net()
    groups = parameter_groups(net, lr=0.01)
    settings = Settings(**{"phase": "train", "num_steps": 12, "seed": 0, "log_every": 1, **numbers})
    ema = None
    if ema_decay:
        ema = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=True
        )
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model=net,
        loss=loss or MeanCrossEntropy(),
        optimizer=torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
        settings=settings,
        mixed=Mixed(precision, CPU),
        tracker=Tracker(folder, phase="train", run_metrics=folder.parent / "all.jsonl", num_steps=settings.num_steps),
        folder=folder,
        validate=validate or (lambda model, step: {"mean_iou": step / 100}),
        config={"key": "value"},
        ema=ema,
        stop=stop,
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_equals_a_hand_written_loop(tmp_path):
    trainer = build(tmp_path / "a", warmup_steps=3, clip_norm=0.5)
    trainer.fit(make_batches)
    net = Net()
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=0.01), lr=0.01, weight_decay=0.1)
    losses = []
    for step, batch in zip(range(12), make_batches(0), strict=False):
        torch.manual_seed(derive_seed(0, "train", step, 0))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * lr_factor(step, num_steps=12, warmup_steps=3)
        loss = F.cross_entropy(net(batch.images), batch.labels.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    for ours, theirs in zip(trainer.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    written = [record["loss"] for record in records(tmp_path / "a") if record["split"] == "train"]
    assert written == pytest.approx(losses, rel=1e-5)


def test_accumulation_equals_the_whole_batch(tmp_path):
    """Parts have different numbers of valid pixels: only the common denominator gives the same gradient."""
    whole = build(tmp_path / "a", net=Net(dropout=0, batchnorm=False))
    parts = build(tmp_path / "b", net=Net(dropout=0, batchnorm=False), accumulate=4)
    whole.fit(make_batches)
    parts.fit(make_batches)
    for ours, theirs in zip(parts.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    first, second = ([record["loss"] for record in records(tmp_path / name)] for name in "ab")
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"ema_decay": 0.9}, {"precision": "fp16"}, {"precision": "bf16", "clip_norm": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [1, 5, 6])
def test_resume_is_bitwise(tmp_path, options, stop_at):
    numbers = {"evaluate_every": 4, "log_every": 3, "checkpoint_every": 1, **options}
    through = build(tmp_path / "a" / "p", **numbers)
    through.fit(make_batches)
    steps = iter(range(1, 100))
    stopped = build(tmp_path / "b" / "p", stop=lambda: next(steps) == stop_at, **numbers)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at}"):
        stopped.fit(make_batches)
    with open(tmp_path / "b" / "p" / "metrics.jsonl", "a") as file:
        file.write('{"written": "after the checkpoint"}\n')
    resumed = build(tmp_path / "b" / "p", **numbers)
    resumed.restore(checkpoint.load_last(tmp_path / "b" / "p" / "checkpoints"), earlier=b"earlier\n")
    resumed.fit(make_batches)
    for name, value in through.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    if through.ema is not None:
        for name, value in through.ema.module.state_dict().items():
            assert torch.equal(resumed.ema.module.state_dict()[name], value), name
    one, other = ((tmp_path / name / "p" / "metrics.jsonl").read_bytes() for name in "ab")
    assert one == other
    assert (tmp_path / "b" / "all.jsonl").read_bytes() == b"earlier\n" + other
    assert resumed.scaler.state_dict() == through.scaler.state_dict()


@pytest.mark.parametrize(
    ("num_steps", "every", "expected"), [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (5, None, [5]), (3, 9, [3])]
)
def test_evaluates_when_due_and_once_at_the_end(tmp_path, num_steps, every, expected):
    seen = []

    def validate(model, step):
        seen.append(step)
        return {"mean_iou": 0.5}

    build(tmp_path / "a", num_steps=num_steps, evaluate_every=every, validate=validate).fit(make_batches)
    assert seen == expected


def test_the_best_is_kept(tmp_path):
    scores = {4: 0.3, 8: 0.7, 12: 0.5}
    trainer = build(tmp_path / "a", evaluate_every=4, validate=lambda model, step: {"mean_iou": scores[step]})
    trainer.fit(make_batches)
    best = checkpoint.load(tmp_path / "a" / "checkpoints" / "best.pt")
    last = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")
    assert (best["step"], last["progress"]["step"]) == (8, 12)
    assert (trainer.progress.best_step, trainer.progress.best_score) == (8, 0.7)
    assert not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    class Poisoned(MeanCrossEntropy):
        calls = 0

        def forward(self, logits, target, *, denominator=None):
            self.calls += 1
            return super().forward(logits, target, denominator=denominator) * (math.nan if self.calls == 3 else 1)

    trainer = build(tmp_path / "a", loss=Poisoned())
    message = r"the loss is nan at step 3 of phase train for the images image2-0, image2-1.*lower optimizer.lr"
    with pytest.raises(NonFiniteLoss, match=message):
        trainer.fit(make_batches)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    bundle = tmp_path / "a" / "failure-0000002"
    assert json.loads((bundle / "error.json").read_text())["names"] == [f"image2-{i}" for i in range(4)]
    batch = torch.load(bundle / "batch.pt", weights_only=True)
    assert torch.equal(batch["images"], next(make_batches(2)).images)
    saved = torch.load(bundle / "state.pt", weights_only=True)
    assert saved["progress"]["step"] == 2


def test_a_failed_write_does_not_stop_training(tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.save_last, []

    def failing(folder, state):
        calls.append(state["progress"]["step"])
        if len(calls) == 2:
            raise OSError("the checkpoint could not be written")
        real(folder, state)

    monkeypatch.setattr(checkpoint, "save_last", failing)
    build(tmp_path / "a", checkpoint_every=4).fit(make_batches)
    assert calls == [4, 8, 12]
    assert "warning: the checkpoint could not be written" in capsys.readouterr().out


def test_evaluation_sees_the_moving_average(tmp_path):
    seen = []
    trainer = build(tmp_path / "a", ema_decay=0.5, validate=lambda model, step: seen.append(model) or {"mean_iou": 0})
    trainer.fit(make_batches)
    assert seen == [trainer.ema.module]
    saved = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")
    assert torch.equal(checkpoint.weights(saved)["head.weight"], trainer.ema.module.head.weight)
    assert not torch.equal(saved["model"]["head.weight"], saved["ema"]["head.weight"])


def test_training_mode_returns_after_an_evaluation(tmp_path):
    modes = []

    class Watching(Net):
        def forward(self, images):
            modes.append(self.training)
            return super().forward(images)

    def validate(model, step):
        model.eval()
        return {"mean_iou": 0.1}

    build(tmp_path / "a", net=Watching(), evaluate_every=3, validate=validate).fit(make_batches)
    assert modes == [True] * 12
